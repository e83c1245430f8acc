"""From a file to batches, through the public functions."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlxlora.data import BatchConfig, SamplesConfig, collate, load, plan_epoch
from mlxlora.errors import DataError
from mlxlora.tokenizer import Tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny.tokenizer(tmp_path_factory.mktemp("tokenizer")))


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def learned(tokenizer: Tokenizer, sample) -> str:
    return tokenizer.decode(sample.tokens[sample.weights > 0])


def test_learns_the_answer_and_its_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "train.jsonl", [chat(f"What is {i}?", f" Paris {i}") for i in range(30)])
    splits = load(path, tokenizer, SamplesConfig(validation_split=0.1))
    assert len(splits.train) == 27 and splits.valid is not None and len(splits.valid) == 3
    sample = splits.train[0]
    number = splits.train.origin(0).rsplit(":", 1)[1]
    assert learned(tokenizer, sample) == f" Paris {int(number) - 1}<|im_end|>"
    assert sample.weights[0] == 0 and sample.origin.startswith(str(path))


def test_batches_hold_what_the_samples_hold(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [chat("Hi " * (i % 7), "one two " * (i % 11 + 1)) for i in range(50)])
    data = load(path, tokenizer, SamplesConfig(validation_split=0)).train
    for config in (
        BatchConfig(batch_size=4),
        BatchConfig(packing=True, max_length=256),
        BatchConfig(tokens_per_batch=300),
    ):
        seen: list[int] = []
        learned_tokens: list[int] = []
        for planned in plan_epoch(data.lengths, config, seed=1, epoch=2):
            batch = collate(data, planned)
            tokens = np.array(batch.tokens).reshape(-1)
            positions, weights = np.array(batch.loss_positions), np.array(batch.weights)
            assert (tokens[positions + 1] == np.array(batch.targets))[weights > 0].all()
            learned_tokens += list(np.array(batch.targets)[weights > 0])
            seen += batch.samples
            if batch.segments is not None:
                assert ((np.array(batch.segments) >= 0).sum(axis=1) <= 256).all()
        assert sorted(seen) == list(range(len(data)))
        expected = [token for sample in data for token in sample.tokens[sample.weights > 0]]
        assert sorted(learned_tokens) == sorted(expected)


def test_problems_come_together_with_their_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": []}\n{"messages": [{"role": "user"}]}\n# a comment\n\n{"messages": [\n')
    with pytest.raises(DataError) as caught:
        load(path, tokenizer)
    assert [problem.where for problem in caught.value.problems] == [f"{path}:{line}" for line in (1, 2, 5)]
