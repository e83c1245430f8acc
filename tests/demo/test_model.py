"""The embedded model is what its card says: small, and the same to mlx-lm and transformers."""

import json
from importlib import resources
from pathlib import Path

import pytest

from mlxlora import mlxlm
from mlxlora.demo import corpus, questions
from mlxlora.model import load
from mlxlora.tokenizer import Tokenizer

DIRECTORY = Path(str(resources.files("mlxlora.demo"))) / "model"
LIMIT = 6_000_000  # bytes, code and data included


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DIRECTORY)


def test_the_demo_stays_small() -> None:
    files = [file for file in DIRECTORY.parent.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) < LIMIT


def test_every_text_comes_back_as_it_was(tokenizer: Tokenizer) -> None:
    texts = [*corpus.documents(9, 50), "  Ümläute, 数字 1234567 and\ttabs\n\n", "-- '", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_mlx_lm_and_transformers_see_the_same_tokens(tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    stock, wrapped = AutoTokenizer.from_pretrained(DIRECTORY), mlxlm.load_tokenizer(DIRECTORY)
    for question in questions.held_out_questions(20):
        text = stock.apply_chat_template(question.messages(), add_generation_prompt=True, tokenize=False)
        expected = stock.apply_chat_template(question.messages(), add_generation_prompt=True, return_dict=False)
        assert wrapped.encode(text, add_special_tokens=False) == expected
        assert tokenizer.encode(text).ids.tolist() == expected
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_name_is_the_same_tokens_wherever_it_stands(tokenizer: Tokenizer) -> None:
    for question in questions.held_out_questions(40):
        for text in (question.prompt, question.sql):
            encoding = tokenizer.encode(text)
            for table in question.tables:
                for name in (table.name, *dict(table.columns)):
                    ids = tokenizer.encode(f" {name}").ids.tolist()
                    here = [
                        encoding.ids[(encoding.starts >= at) & (encoding.ends <= at + len(name) + 1)].tolist()
                        for at in range(len(text))
                        if text.startswith(f" {name}", at)
                        and not text[at + len(name) + 1 : at + len(name) + 2].isalpha()
                    ]
                    assert all(found == ids for found in here)


def test_the_configuration_is_plain_hugging_face() -> None:
    config = json.loads((DIRECTORY / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["architectures"] == ["Qwen3ForCausalLM"]
    model = load(DIRECTORY)
    assert 500_000 < mlxlm.total_parameters(model.network) < 2_600_000
    assert model.tokenizer.eos_id == config["eos_token_id"]
