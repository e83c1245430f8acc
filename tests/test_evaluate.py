"""Loss and perplexity are the plain mean over trained tokens, however samples are put into batches."""

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest

from mlxlora import mlxlm
from mlxlora.data import SamplesConfig
from mlxlora.data import load as load_data
from mlxlora.errors import ConfigError
from mlxlora.evaluate import evaluate
from mlxlora.tokenizer import Tokenizer
from tests import tiny

TEXT = "the quick brown fox jumps over a lazy dog and what is capital of France question answer please"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_directory(tmp_path_factory.mktemp("evaluate") / "model", "llama")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = []
    for i in range(9):
        asked, said = " ".join(WORDS[: i + 1]), " ".join(WORDS[i : 2 * i + 3])
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plainly(directory: Path, data: Path, adapter: Path | None = None) -> tuple[float, float]:
    """The same one sample at a time, with stock mlx-lm."""
    network, _ = mlxlm.module("utils").load(str(directory), adapter_path=None if adapter is None else str(adapter))
    samples = load_data(data, Tokenizer.load(directory), SamplesConfig(validation_split=0.0)).train
    total = weight = 0.0
    for sample in samples:
        logits = network(mx.array(sample.tokens)[None, :-1])[0].astype(mx.float32)
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        told = mx.take_along_axis(scores, mx.array(sample.tokens[1:])[:, None], axis=-1)[:, 0]
        total -= float((told * mx.array(sample.weights[1:])).sum())
        weight += float(sample.weights.sum())
    return total / weight, weight


def test_equals_the_plain_mean(directory: Path, data: Path) -> None:
    result = evaluate(str(directory), data)
    loss, weight = plainly(directory, data)
    assert result.base.loss == pytest.approx(loss, abs=1e-5) and result.tokens == weight
    assert result.base.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert result.adapted is None and result.samples == 9 and result.split == "train"


@pytest.mark.parametrize("tokens", [8, 64, 100_000])
def test_does_not_depend_on_batches(directory: Path, data: Path, tokens: int) -> None:
    loss, _ = plainly(directory, data)
    assert evaluate(str(directory), data, tokens_per_batch=tokens).base.loss == pytest.approx(loss, abs=1e-5)


def test_without_and_with_adapters(directory: Path, data: Path, tmp_path: Path) -> None:
    adapter = tiny.adapter_directory(tmp_path / "style", directory, size=1.0)
    result = evaluate(str(directory), data, adapter=[str(adapter)])
    assert result.adapted is not None
    assert result.base.loss == pytest.approx(plainly(directory, data)[0], abs=1e-5)
    assert result.adapted.loss == pytest.approx(plainly(directory, data, adapter)[0], abs=1e-5)
    assert abs(result.adapted.loss - result.base.loss) > 1e-3
    text = str(result)
    assert f"{result.base.loss:.4f}" in text and f"{result.adapted.loss:.4f}" in text
    off = evaluate(str(directory), data, adapter=[f"{adapter}=0"])
    assert off.adapted is not None and off.adapted.loss == pytest.approx(off.base.loss, abs=1e-6)


def test_splits(directory: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = data.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:6]))
    (folder / "valid.jsonl").write_text("".join(lines[6:]))
    assert (evaluate(str(directory), folder).split, evaluate(str(directory), folder).samples) == ("valid", 3)
    assert evaluate(str(directory), folder, split="train").samples == 6
    with pytest.raises(ConfigError, match="no test data"):
        evaluate(str(directory), folder, split="test")
    with pytest.raises(ConfigError, match="tokens_per_batch"):
        evaluate(str(directory), folder, tokens_per_batch=0)


def test_what_was_cut_is_said(directory: Path, data: Path) -> None:
    result = evaluate(str(directory), data, samples=SamplesConfig(max_length=24))
    assert any("truncated" in note for note in result.notes)
