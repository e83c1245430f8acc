"""A loss that is no number: the update is left out, the run stops and names step and samples, nothing bad is saved."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlxlora import cli
from mlxlora.adapters import read_adapter
from mlxlora.files import load_safetensors, save_safetensors
from mlxlora.tokenizer import Tokenizer
from tests import tiny
from tests.faults import session

OPTIONS = {
    "training.epochs": 2, "training.batch_size": 2, "training.save_every": 1, "samples.validation_split": 0.0,
}  # fmt: skip
POISONED = 9  # the row, from 0, that holds the token whose embedding is no number


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model that computes no number wherever `§` occurs, and data with one such row."""
    model = tiny.model_directory(tmp_path / "model", "llama")
    rows = [json.loads(line) for line in session.rows(tmp_path / "data.jsonl").read_text().splitlines()]
    rows[POISONED]["messages"][0]["content"] += " §"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.load(model)
    others = {
        int(i) for e in tokenizer.encode_batch([json.dumps(rows[0]), "What is and ? It is 0123456789."]) for i in e.ids
    }
    poison = [int(token) for token in tokenizer.encode("§").ids if int(token) not in others]
    assert poison
    path = model / "model.safetensors"
    tensors = load_safetensors(path)
    mx.eval(tensors)
    tensors["model.embed_tokens.weight"][poison[0]] = float("nan")
    save_safetensors(path, tensors, {"format": "mlx"})
    return tmp_path


def train(place: Path, **more: object) -> int:
    words = session.flags(place / "model", place / "data.jsonl", place / "run", OPTIONS)
    for name, value in more.items():
        words += [f"--training.{name}", str(value)]
    return cli.main(words)


def test_it_stops_and_names_the_samples(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place) == 1
    said = capsys.readouterr().err
    assert f"data.jsonl:{POISONED + 1}" in said and "not a finite number" in said and "Traceback" not in said, said
    step = int(said.split("error: step ")[1].split(":")[0])
    checkpoints = sorted((place / "run" / "checkpoints").iterdir())
    assert int(checkpoints[-1].name[5:]) == step - 1, "the last good checkpoint is kept"
    read_adapter(place / "run" / "adapter")  # refuses what is not finite
    assert train(place) == 1, "the same again from there"
    assert f"error: step {step}:" in capsys.readouterr().err


def test_a_number_of_them_may_be_allowed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, skip_nonfinite=1) == 1, "the second epoch meets it again"
    capsys.readouterr()
    assert train(place, skip_nonfinite=2) == 0, capsys.readouterr().err
    events = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    left_out = [event for event in events if event["event"] == "step" and not event["applied"]]
    assert len(left_out) == 2 and all(event["loss"] is None for event in left_out)
    read_adapter(place / "run" / "adapter")
