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


def test_a_part_is_drawn_evenly_and_always_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = write(tmp_path / "a.jsonl", [chat(f"Question {i}", f"Answer {i}") for i in range(300)])
    second = write(tmp_path / "b.jsonl", [{"text": f"Text {i}"} for i in range(100)])
    config = SamplesConfig(validation_split=0, cache=tmp_path / "cache")
    data = load([first, second], tokenizer, config, most=80).train
    lines = [data.origin(position).rsplit("/", 1)[1].split(":") for position in range(len(data))]
    assert len(data) == 80 == len({tuple(line) for line in lines})
    assert 10 <= sum(name == "b.jsonl" for name, _ in lines) <= 30  # about a quarter
    numbers = [int(number) for name, number in lines if name == "a.jsonl"]
    assert numbers == sorted(numbers) and min(numbers) < 40 and max(numbers) > 260
    again = load([first, second], tokenizer, config, most=80).train
    assert again.fingerprint == data.fingerprint
    assert len(load([first, second], tokenizer, config).train) == 400  # another entry of the cache
    assert (
        load([first, second], tokenizer, config, most=4000).train.fingerprint
        == load([first, second], tokenizer, config).train.fingerprint
    )
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:301"):  # rows that are not drawn are looked at all the same
        load([first, second], tokenizer, config, most=10)
