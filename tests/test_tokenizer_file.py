"""A tokenizer.json that asks for the machine's memory, or contradicts itself, is refused in words."""

import json
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
