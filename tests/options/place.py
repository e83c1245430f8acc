"""What the commands of the table work on: tiny models, adapters and data, made once and only when one is asked for."""

from __future__ import annotations

import json
import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora.adapters import read_adapter, write_adapter
from mlxlora.files import write_json
from mlxlora.fuse import fuse
from mlxlora_convert.export import export
from mlxlora_convert.gguf_options import GGUFOptions
from tests import tiny
from tests.faults import session

OWN_CODE = """
from pathlib import Path
Path({marker!r}).touch()
from mlx_lm.models.qwen3 import Model, ModelArgs
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast): pass
"""
DATED = "{{ strftime_now('%Y') }}" + tiny.CHATML


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Place:
    """A folder; `@name` in a command stands for what the property `name` gives, `@out` for a fresh path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def filled(self, word: str) -> str:
        """`word` with every @name in it as a path."""
        return re.sub(r"@(\w+)", lambda match: str(getattr(self, match[1])), word)

    @property
    def out(self) -> Path:
        self.count += 1
        return self.folder / f"out-{self.count}"

    # -- models -------------------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> Path:
        return tiny.model_directory(self.folder / "model", "qwen3")

    @cached_property
    def single(self) -> Path:
        """One block: a run is over sooner."""
        return tiny.model_directory(self.folder / "single", "qwen3", num_hidden_layers=1)

    @cached_property
    def other(self) -> Path:
        return tiny.model_directory(self.folder / "other", "qwen3", seed=5)

    @cached_property
    def dated(self) -> Path:
        return tiny.model_directory(self.folder / "dated", "qwen3", template=DATED)

    @cached_property
    def with_bos(self) -> Path:
        """Its tokenizer has a beginning-of-text token, and does not write it by itself."""
        path = tiny.model_directory(self.folder / "with-bos", "qwen3")
        settings = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|endoftext|>"}))
        return path

    @cached_property
    def unended(self) -> Path:
        """Its template ends no turn."""
        template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
        return tiny.model_directory(self.folder / "unended", "qwen3", template=template)

    @cached_property
    def quantized(self) -> Path:
        return tiny.model_directory(self.folder / "quantized", "qwen3", {"bits": 4, "group_size": 32})

    @cached_property
    def wide(self) -> Path:
        """Wide enough for groups of 64."""
        return tiny.model_directory(self.folder / "wide", "qwen3", hidden_size=64)

    @cached_property
    def experts(self) -> Path:
        return tiny.model_directory(self.folder / "experts", "qwen3_moe")

    @cached_property
    def gguf(self) -> Path:
        export(str(self.model), "gguf", self.folder / "model.gguf", check=False, gguf=GGUFOptions(type="q8_0"))
        return self.folder / "model.gguf"

    @property
    def own_code(self) -> Path:
        """Its network and its tokenizer are Python files that it brings along; a new one each time, since transformers
        imports a file once."""
        path = shutil.copytree(self.model, self.out)
        (path / "own.py").write_text(OWN_CODE.format(marker=str(path / "it-ran")))  # transformers runs a copy
        write_json(path / "config.json", json.loads((path / "config.json").read_text()) | {"model_file": "own.py"})
        settings = json.loads((path / "tokenizer_config.json").read_text())
        settings |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
        write_json(path / "tokenizer_config.json", settings)
        return path

    # -- adapters -----------------------------------------------------------------------------------------------------

    @cached_property
    def style(self) -> Path:
        return tiny.adapter_directory(self.folder / "style", self.model, seed=1, size=2.0)

    @cached_property
    def begun(self) -> Path:
        """What a run may begin with."""
        return tiny.adapter_directory(self.folder / "begun", self.single, seed=2, rank=2)

    @cached_property
    def facts(self) -> Path:
        return tiny.adapter_directory(self.folder / "facts", self.model, seed=2, size=2.0)

    @cached_property
    def foreign(self) -> Path:
        """An adapter made for the other model."""
        return tiny.adapter_directory(self.folder / "foreign", self.other, seed=3, size=2.0)

    @cached_property
    def on_experts(self) -> Path:
        return tiny.adapter_directory(self.folder / "on-experts", self.experts, seed=6)

    @cached_property
    def on_quantized(self) -> Path:
        return tiny.adapter_directory(self.folder / "on-quantized", self.quantized, seed=4, size=1.0)

    @cached_property
    def stock(self) -> Path:
        return self._stock("stock", self.style)

    @cached_property
    def other_stock(self) -> Path:
        return self._stock("other-stock", self.facts)

    def _stock(self, name: str, source: Path) -> Path:
        """An adapter in mlx-lm's own layout whose configuration leaves the scale out."""
        path = self.folder / name
        path.mkdir()
        write_adapter(path, read_adapter(source))
        (path / "manifest.json").unlink(missing_ok=True)
        config = json.loads((path / "adapter_config.json").read_text())
        parameters = {name: value for name, value in config["lora_parameters"].items() if name != "scale"}
        parameters.pop("alpha", None)
        stock = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
        write_json(path / "adapter_config.json", stock)
        return path

    # -- data ---------------------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> Path:
        return session.rows(self.folder / "rows.jsonl", 12)

    @cached_property
    def more(self) -> Path:
        return session.rows(self.folder / "more.jsonl", 20)

    @cached_property
    def few(self) -> Path:
        return session.rows(self.folder / "few.jsonl", 3)

    @cached_property
    def talks(self) -> Path:
        """Several turns each, the last answer with a thought before it."""
        turns = [("user", "Hello"), ("assistant", "Hi there"), ("user", "One and two?")]
        messages = [{"role": role, "content": text} for role, text in turns]
        answer = {"role": "assistant", "content": "<think>I add the numbers</think>\n\nThree"}
        return lines(self.folder / "talks.jsonl", [{"messages": [*messages, answer]}] * 4)

    @cached_property
    def completions(self) -> Path:
        rows = [{"prompt": f"What is {n}?", "completion": f" It is {n}."} for n in range(8)]
        return lines(self.folder / "completions.jsonl", rows)

    @cached_property
    def ambiguous(self) -> Path:
        """Rows with the keys of two formats."""
        return lines(self.folder / "ambiguous.jsonl", [{"prompt": "One?", "completion": "Yes.", "text": "one two"}] * 8)

    @cached_property
    def renamed(self) -> Path:
        """Rows with a key of their own beside ours."""
        return lines(self.folder / "renamed.jsonl", [{"prompt": "One?", "completion": "Yes.", "reply": "Not so."}] * 8)

    @cached_property
    def preferences(self) -> Path:
        turns = [{"role": "user", "content": "One?"}]
        row = {name: [*turns, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
        return lines(self.folder / "preferences.jsonl", [row] * 8)

    @cached_property
    def roles(self) -> Path:
        """A conversation with a role that nobody knows."""
        turns = [("user", "One?"), ("narrator", "He thinks."), ("assistant", "Yes.")]
        return lines(
            self.folder / "roles.jsonl", [{"messages": [{"role": role, "content": text} for role, text in turns]}]
        )

    @cached_property
    def texts(self) -> Path:
        rows = [{"text": f"Poem {n}: " + " ".join(f"line {n} {k}" for k in range(4 + n))} for n in range(8)]
        return lines(self.folder / "texts.jsonl", rows)

    @cached_property
    def poems(self) -> Path:
        path = self.folder / "poems.txt"
        path.write_text("".join(f"## Poem {n}\n" + "roses are red\n" * (n + 1) for n in range(6)))
        return path

    @cached_property
    def unusable(self) -> Path:
        """Half of the rows have nothing to learn within 24 tokens."""
        long = {"messages": [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": ""}]}
        short = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
        return lines(self.folder / "unusable.jsonl", [long, short] * 6)

    @cached_property
    def splits(self) -> Path:
        """A directory with files for training, validation and testing."""
        path = self.folder / "splits"
        path.mkdir()
        for name, count in (("train", 6), ("valid", 4), ("test", 2)):
            session.rows(path / f"{name}.jsonl", count)
        return path

    @cached_property
    def template(self) -> Path:
        path = self.folder / "template.jinja"
        path.write_text(tiny.CHATML.replace("'<|im_start|>' +", "'<|im_start|>Here speaks ' +"))
        return path

    @property
    def written(self) -> Path:
        """A file that is there already."""
        return lines(self.out.with_suffix(".jsonl"), [{}])

    @cached_property
    def card(self) -> Path:
        path = self.folder / "card.md"
        path.write_text("# A card of my own\n")
        return path

    # -- what runs leave ----------------------------------------------------------------------------------------------

    @cached_property
    def run(self) -> Path:
        """A finished run."""
        session.run(self.model, self.rows, self.folder / "run", {"training.steps": 2, "training.batch_size": 2})
        return self.folder / "run"

    @property
    def finished(self) -> Path:
        """Another run like it, which may be written over."""
        return shutil.copytree(self.run, self.out)

    @cached_property
    def second_run(self) -> Path:
        return shutil.copytree(self.run, self.folder / "second-run")

    @cached_property
    def fused(self) -> Path:
        fuse(str(self.model), [str(self.style)], self.folder / "fused")
        return self.folder / "fused"


def listed(path: Path) -> list[str]:
    """The names of all files below a folder."""
    return sorted(str(one.relative_to(path)) for one in path.rglob("*") if one.is_file()) if path.is_dir() else []


def tensors(path: Path) -> dict[str, bytes]:
    """Every tensor of a safetensors file, as bytes."""
    return {name: np.array(mx.view(value.flatten(), mx.uint8)).tobytes() for name, value in tiny.tensors(path).items()}
