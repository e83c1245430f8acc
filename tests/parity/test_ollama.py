"""Ollama itself on what `--to ollama` writes: the prompt it renders, the tokens it counts, what it says and how surely.

Needs `ollama` on the PATH; the server is started here, on this machine's loopback, with a folder of models of its own.
"""

import datetime
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.data.template import ChatTemplate
from mlxlora.generate import prompt_of
from mlxlora.model import LanguageModel, load
from mlxlora_convert.formats import FORMATS
from mlxlora_convert.ollama import export_ollama
from mlxlora_convert.ollama_options import OllamaOptions
from tests import tiny
from tests.convert.test_ollama import CONVERSATIONS, DATE, TEMPLATES
from tests.vocabularies import sentencepiece_directory

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(shutil.which("ollama") is None, reason="needs Ollama: https://ollama.com/download"),
]
Messages = list[dict[str, str]]
SAID = 12  # tokens of an answer that are compared
LIKELIEST = 20  # entries of the vocabulary whose log-probabilities are compared
EXACT, TABLE = 1e-5, 2e-3  # as in test_gguf.py
GREEDY = {"temperature": 0, "repeat_penalty": 1.0, "num_predict": SAID, "num_ctx": 512}
QUESTIONS = (
    "Who?",
    "What is the capital of France?",
    "one two three",
    "SELECT name",
    "Grüße!",
    "thank you",
    "def add(",
)
CHATS: list[Messages] = [[{"role": role, "content": text} for role, text in one] for one in CONVERSATIONS]


@dataclass(frozen=True)
class Ollama:
    """A server that runs, and its command line."""

    address: str
    environment: dict[str, str]

    def create(self, name: str, directory: Path) -> None:
        """By the command that the export says comes next."""
        words = [word.replace("{out}", str(directory)).replace("NAME", name) for word in FORMATS["ollama"].after]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    def ask(self, model: str, messages: Messages, **more: Any) -> dict[str, Any]:
        body = {"model": model, "messages": messages, "stream": False, "options": GREEDY, **more}
        request = urllib.request.Request(f"http://{self.address}/api/chat", json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        return found

    def prompt(self, model: str, messages: Messages) -> str:
        text: str = self.ask(model, messages, _debug_render_only=True)["_debug_info"]["rendered_template"]
        return text


@pytest.fixture(scope="module")
def ollama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ollama]:
    home = tmp_path_factory.mktemp("ollama")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **{name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        "HOME": str(home), "OLLAMA_HOST": address, "OLLAMA_MODELS": str(home / "models"), "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_MAX_LOADED_MODELS": "1", "OLLAMA_GO_TEMPLATE": "1", "OLLAMA_FLASH_ATTENTION": "0",
        "OLLAMA_KV_CACHE_TYPE": "f32",
    }  # fmt: skip
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(["ollama", "serve"], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://{address}/api/version", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.1)
        yield Ollama(address, environment)
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a sentencepiece vocabulary, which begins every text with BOS."""
    model, _ = sentencepiece_directory(tmp_path_factory.mktemp("base") / "source")
    return model


def with_template(model: Path, path: Path, name: str) -> Path:
    shutil.copytree(model, path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"chat_template": TEMPLATES[name], "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def exported(model: Path, out: Path, **options: Any) -> Path:
    out.mkdir()
    export_ollama(model, out, OllamaOptions(type="f32", date=str(DATE), **options))
    return out


def rendered(name: str, messages: Messages, date: datetime.date) -> str:
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(TEMPLATES[name], variables, date=date).render(messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_renders_what_jinja_renders(ollama: Ollama, base: Path, tmp_path: Path, name: str) -> None:
    ollama.create("rendered", exported(with_template(base, tmp_path / "model", name), tmp_path / "out"))
    for messages in CHATS:
        if messages[0]["role"] != "system" or name != "gemma 2, no system":
            expected = rendered(name, messages, DATE)
            assert ollama.prompt("rendered", messages) == expected.removeprefix("<s>")  # which llama.cpp puts there


@pytest.mark.parametrize("name", ["chatml", "qwen3", "gemma", "llama 2", "llama3", "deepseek-r1"])
def test_a_template_left_to_it_is_read_from_the_file(ollama: Ollama, base: Path, tmp_path: Path, name: str) -> None:
    model = with_template(base, tmp_path / "model", name)
    ollama.create("its-own", exported(model, tmp_path / "out", template="gguf"))
    for messages in CHATS:
        expected = rendered(name, messages, datetime.date.today()).removeprefix("<s>")
        assert ollama.prompt("its-own", messages).removeprefix("<s>") == expected


def greedy(model: LanguageModel, prompt: list[int]) -> tuple[list[int], Any]:
    """The likeliest tokens after a prompt, and the largest log-probabilities of the first one."""
    tokens: list[int] = []
    first = None
    for _ in range(SAID):
        logits = model.network(mx.array([[*prompt, *tokens]]))[0, -1].astype(mx.float32)
        first = np.sort(np.array(logits - mx.logsumexp(logits)))[::-1][:LIKELIEST] if first is None else first
        tokens.append(int(mx.argmax(logits)))
    return tokens, first


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "mixtral", "gemma3", "phi3", "with BOS"])
def test_it_says_what_we_say(ollama: Ollama, base: Path, tmp_path: Path, family: str) -> None:
    if family == "with BOS":
        directory = with_template(base, tmp_path / "model", "llama 2")
    else:
        changes: dict[str, Any] = {"hidden_size": 64} if family == "gemma3" else {}
        directory = tiny.with_logits(tiny.model_directory(tmp_path / "model", family, **changes), 0.5)
    ollama.create("said", exported(directory, tmp_path / "out"))
    model = load(str(directory))
    compared = 0
    for messages in [*CHATS, *([{"role": "user", "content": text}] for text in QUESTIONS)]:
        prompt = prompt_of(model, messages)
        found = ollama.ask("said", messages, logprobs=True, top_logprobs=LIKELIEST)
        assert found["prompt_eval_count"] == len(prompt.tokens)
        tokens, first = greedy(model, list(prompt.tokens))
        # a token that ends a text for llama.cpp, or part of a letter, is said in another way: compared up to there
        certain = re.split(r"[^ -;=-~]", model.tokenizer.hf.decode(tokens))[0].strip()
        if len(certain) < len(model.tokenizer.hf.decode(tokens[:1])):
            continue
        assert found["message"]["content"].strip().startswith(certain)
        theirs = [one["logprob"] for one in found["logprobs"][0]["top_logprobs"]]
        assert len(theirs) == LIKELIEST and np.abs(first - theirs).max() < (TABLE if family == "gemma3" else EXACT)
        compared += 1
    assert compared >= 3
