"""A tokenizer.json that asks for the machine's memory, or contradicts itself, is refused in words."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest

from mlxlora.errors import ModelError
from mlxlora.tokenizer import Tokenizer
from mlxlora.tokenizer_file import check_tokenizer_file
from tests import tiny


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["vocab"].update(huge=2**31 - 1), "token 'huge': has the id 2147483647"),
        (lambda c: c["model"]["vocab"].update(minus=-1), "token 'minus'"),
        (lambda c: c["added_tokens"].append({"content": "x", "id": 10**9}), "added_tokens[3]"),
        (lambda c: c.update(added_tokens=5), "added_tokens: expected a list"),
        (lambda c: c["model"].update(vocab=5), "vocab: expected an object or a list"),
        (lambda c: c["model"].update(type="Unigram", vocab=[["a", -1.0], 3]), "vocab[1]"),
        (lambda c: c.update(model=[]), "is no tokenizer"),
    ],
)
def test_ids_that_cannot_be_meant(tmp_path: Path, change: Any, message: str) -> None:
    tiny.tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    check_tokenizer_file(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError) as caught:
        Tokenizer.load(tmp_path)
    assert message in str(caught.value)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replaced(content: str, *, regex: str = "", string: str = "a") -> dict[str, Any]:
    pattern = {"Regex": regex} if regex else {"String": string}
    return {"type": "Replace", "pattern": pattern, "content": content}


def added(texts: list[str]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return [{"id": 1000 + number, "content": text, **flags} for number, text in enumerate(texts)]


ENDLESS = "cannot take the text: .*retry-limit"
HOSTILE = [
    ({"pre_tokenizer": split(r"(a+)+$")}, ENDLESS),
    ({"pre_tokenizer": split(r"( +)+$")}, ENDLESS),
    ({"normalizer": replaced("x", regex=r"(a+)+$")}, ENDLESS),
    ({"pre_tokenizer": split("(a|b)?" * 200_000)}, r"a pattern of 1,200,000 characters"),
    ({"pre_tokenizer": split("(" * 5000 + "a" + ")" * 5000)}, "parse depth limit"),
    ({"normalizer": {"type": "Sequence", "normalizers": [replaced("a" * 100)] * 5}}, "times longer"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 60}}, "times longer"),
    ({"normalizer": replaced("a" * 6_000)}, "takes .* s for"),
    ({"normalizer": {"type": "Prepend", "prepend": "a" * 5_000_000}}, "holds a pattern"),
    ({"added_tokens": added(["t" * 1001])}, r"added_tokens\[0\]"),
    ({"added_tokens": added([f"{n:05}" + "t" * 900 for n in range(2500)])}, "together longer"),
    ({"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2000,
                         "pair": [], "special_tokens": {}}}, "more than 1,000 parts"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[message for _, message in HOSTILE])
def test_what_takes_the_time_or_the_memory_of_the_machine(tmp_path: Path, change: Any, message: str) -> None:
    tiny.tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    started = time.process_time()
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(tmp_path)
    assert time.process_time() - started < 5


def test_a_pattern_that_gives_up_on_one_text_alone(tmp_path: Path) -> None:
    """Nothing that is tried beforehand meets it: the text is named as what cannot be taken."""
    tiny.tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": split(r"(Q+)+$")}))
    tokenizer = Tokenizer.load(tmp_path)
    for encode in (tokenizer.encode_batch, tokenizer.encode_ids, tokenizer.encode_aliased):
        with pytest.raises(ModelError, match="cannot take the text"):
            encode(["Q" * 40 + "!"])


@pytest.mark.parametrize("config", [{"num_hidden_layers": 10**9}, {"vision_config": {"num_hidden_layers": 10**9}}])
def test_a_config_beyond_measure_is_refused_before_the_tokenizer_is_loaded(tmp_path: Path, config: Any) -> None:
    """transformers reads it for the tokenizer's sake, and makes a list of a thousand million names."""
    tiny.tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"} | config))
    with pytest.raises(ModelError, match=r"num_hidden_layers: must be a whole number from 0 to 10,000"):
        Tokenizer.load(tmp_path)


def test_what_other_threads_do_meanwhile_is_not_the_tokenizer_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their time counts for the process: a model that trains beside would make every tokenizer a slow one."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: float(next(seconds)))
    tiny.tokenizer(tmp_path)
    Tokenizer.load(tmp_path)
