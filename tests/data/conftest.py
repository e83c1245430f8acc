"""A small tokenizer for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from mlxlora.tokenizer import Tokenizer
from tests import tiny


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny.tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights: nothing that looks at data may need them."""
    directory = tiny.tokenizer(tmp_path_factory.mktemp("model"))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows to a file of the test's folder."""

    def write(rows: Iterable[object], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
