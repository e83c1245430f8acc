"""Wrong configurations: exit code 2, before a model or data are looked for, naming the setting and the nearest one."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mlxlora import cli
from tests.patience import PATIENCE

BASE = ["train", "--model", "/nowhere/model", "--data", "/nowhere/data.jsonl", "--out", "/nowhere/run"]

WRONG: list[tuple[str, list[str]]] = [  # flags, and words that the message must have
    ("--training.batchsize 4", ["batchsize", "training.batch_size"]),
    ("--training.epoch 1", ["training.epoch", "training.epochs"]),
    ("--adapter.ranks 8", ["adapter.ranks", "adapter.rank"]),
    ("--optimizer.lr 1e-4", ["optimizer.lr"]),
    ("--optimizer.learningrate 1e-4", ["learningrate", "optimizer.learning_rate"]),
    ("--samples.max_len 512", ["max_len", "samples.max_length"]),
    ("--modell x", ["modell", "model"]),
    ("--batch_size 4", ["batch_size", "training.batch_size"]),
    ("--training.batch_size 0", ["training.batch_size", "0"]),
    ("--training.batch_size -1", ["training.batch_size", "-1"]),
    ("--training.batch_size 2.5", ["training.batch_size", "2.5"]),
    ("--training.batch_size four", ["training.batch_size", "four"]),
    ("--training.accumulate 0", ["training.accumulate"]),
    ("--training.steps 0", ["training.steps"]),
    ("--training.epochs 0", ["training.epochs"]),
    ("--training.epochs -1", ["training.epochs"]),
    ("--training.epochs nan", ["training.epochs"]),
    ("--training.epochs 1 --training.steps 5", ["training.epochs", "training.steps", "contradict"]),
    ("--training.batch_size 2 --training.tokens_per_batch 512", ["batch_size", "tokens_per_batch", "contradict"]),
    ("--training.checkpoint_blocks sometimes", ["checkpoint_blocks"]),
    ("--training.keep 0", ["training.keep"]),
    ("--training.seed -1", ["training.seed"]),
    ("--training.patience 0", ["training.patience"]),
    ("--training.target_loss -1", ["training.target_loss"]),
    ("--training.max_minutes 0", ["training.max_minutes"]),
    ("--training.skip_nonfinite -1", ["training.skip_nonfinite"]),
    ("--training.validate_every 0", ["training.validate_every"]),
    ("--optimizer.learning_rate 0", ["optimizer.learning_rate"]),
    ("--optimizer.learning_rate -1e-4", ["optimizer.learning_rate"]),
    ("--optimizer.learning_rate 1000", ["optimizer.learning_rate"]),
    ("--optimizer.learning_rate inf", ["optimizer.learning_rate"]),
    ("--optimizer.learning_rate nan", ["optimizer.learning_rate"]),
    ("--optimizer.name adamx", ["optimizer.name", "adamw"]),
    ("--optimizer.schedule cosinus", ["optimizer.schedule", "cosine"]),
    ("--optimizer.betas [0.9,1.5]", ["betas"]),
    ("--optimizer.warmup_ratio 1.5", ["warmup_ratio"]),
    ("--optimizer.warmup_ratio 0.1 --optimizer.warmup_steps 5", ["warmup_ratio", "warmup_steps"]),
    ("--optimizer.min_learning_rate 1", ["min_learning_rate"]),
    ("--optimizer.max_grad_norm 0", ["max_grad_norm"]),
    ("--optimizer.name sgd --optimizer.betas [0.9,0.99]", ["betas", "sgd"]),
    ("--adapter.rank 0", ["rank"]),
    ("--adapter.rank 100000000", ["rank"]),
    ("--adapter.alpha -1", ["alpha"]),
    ("--adapter.alpha 1e30", ["alpha"]),
    ("--adapter.dropout 1", ["dropout"]),
    ("--adapter.type lorra", ["type", "lora"]),
    ("--samples.max_length 0", ["max_length"]),
    ("--samples.max_length -5", ["max_length"]),
    ("--samples.loss_on answers", ["loss_on", "assistant"]),
    ("--samples.validation_split 1.5", ["validation_split"]),
    ("--samples.cache /dev/null", ["cache", "/dev/null is a file"]),
    ("--memory_limit lots", ["memory_limit", "lots"]),
    ("--memory_limit 12", ["memory_limit"]),
    ("--report_to tensorbord", ["tensorbord", "tensorboard"]),
    ("--config /nowhere/config.yaml", ["/nowhere/config.yaml"]),
]
YAML = [
    ("training:\n  batchsize: 4\n", ["batchsize", "training.batch_size"]),
    ("training:\n  batch_size: four\n", ["training.batch_size", "four"]),
    ("training: 5\n", ["training"]),
    ("adapter:\n  rank: 8\n  rank: 16\n", ["rank", "twice"]),
    ("adapter: [1\n", ["config.yaml"]),
    ("!!python/object/apply:os.getcwd []\n", ["config.yaml"]),
    ("[1, 2]\n", ["config.yaml"]),
]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was looked for")

    monkeypatch.setattr("mlxlora.hub.find", never)


def refused(words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(words)
    said = capsys.readouterr()
    assert code == 2, said.err
    assert not said.out and said.err.startswith("error: ") and "Traceback" not in said.err
    assert all(word in said.err for word in expected), said.err


@pytest.mark.parametrize(("flags", "expected"), WRONG, ids=[flags for flags, _ in WRONG])
def test_wrong_flags(flags: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused([*BASE, *flags.split()], expected, capsys)


@pytest.mark.parametrize(("text", "expected"), YAML)
def test_wrong_yaml(text: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(text)
    refused([*BASE, "--config", str(tmp_path / "config.yaml")], expected, capsys)


@pytest.mark.parametrize("missing", ["--model", "--data", "--out"])
def test_what_is_missing_is_named(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    at = BASE.index(missing)
    refused(BASE[:at] + BASE[at + 2 :], [missing], capsys)


def test_it_takes_less_than_two_seconds() -> None:
    """Of this process's own work: a busy machine may take longer, which says nothing about us."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "mlxlora", *BASE, "--training.batchsize", "4"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert done.returncode == 2 and "training.batch_size" in done.stderr, done.stderr
    assert seconds < 2, seconds
    print(f"{len(WRONG) + len(YAML) + 3} wrong configurations refused; one takes {seconds:.2f} s in a fresh process")
