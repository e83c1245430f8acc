"""An unfinished run goes on only as the run that it was: every change is named, exit code 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora import cli
from mlxlora.files import load_safetensors, save_safetensors
from mlxlora.training.checkpoint import FILES
from tests.faults import session

OPTIONS = session.STOPPED


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session.stopped(tmp_path_factory.mktemp("refusals"))


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def resume(folder: Path, run: Path, **changes: Any) -> int:
    words = session.flags(folder / "model", folder / "data.jsonl", run, OPTIONS)
    for name, value in changes.items():
        words += [f"--{name.replace('__', '.')}", str(value)]
    return cli.main(words)


SETTINGS = [
    ("adapter__rank", 8), ("adapter__alpha", 32.0), ("adapter__targets", "attention"), ("adapter__type", "dora"),
    ("adapter__dropout", 0.1), ("adapter__layers", 1), ("adapter__rslora", "true"), ("optimizer__name", "adam"),
    ("optimizer__learning_rate", 0.001), ("optimizer__schedule", "linear"), ("training__batch_size", 3),
    ("training__accumulate", 2), ("training__seed", 1), ("samples__max_length", 64), ("samples__loss_on", "last"),
    ("samples__packing", "true"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_changed_setting(stopped: Path, name: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(stopped / "run")
    assert resume(stopped, stopped / "run", **{name: value}) == 2
    said = capsys.readouterr().err
    assert f"{name.replace('__', '.')}: was " in said and "begun with other settings" in said, said
    assert tree(stopped / "run") == before


def another_row(folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_text(path.read_text().replace("It is 3.", "It is 4."))


def another_weight(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    tensors = dict(load_safetensors(path))
    mx.eval(tensors)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_safetensors(path, tensors, {"format": "mlx"})


def another_template(folder: Path) -> None:
    for path in (folder / "model").glob("*"):
        if (
            path.suffix in (".json", ".jinja")
            and "<|im_start|>" in path.read_text()
            and "for message" in path.read_text()
        ):
            path.write_text(path.read_text().replace("<|im_end|>' + '\\n'", "<|im_end|>'", 1).replace("\\\\n'", "'", 1))


def another_tokenizer(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    added = content["added_tokens"]
    added.append({**added[-1], "id": max(content["model"]["vocab"].values()) + 1, "content": "<|new|>"})
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (another_row, ["data: was"]),
        (another_weight, ["model: was"]),
        (another_template, ["chat template: was", "data: was"]),
        (another_tokenizer, ["tokenizer: was"]),
    ],
)
def test_changed_contents(
    stopped: Path, tmp_path: Path, change: Callable[[Path], None], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path / "copy")
    original = tree(tmp_path / "copy")
    change(tmp_path / "copy")
    before = tree(tmp_path / "copy")
    assert before != original, "nothing was changed"
    assert resume(tmp_path / "copy", tmp_path / "copy" / "run") == 2
    said = capsys.readouterr().err
    assert all(word in said for word in named), said
    assert tree(tmp_path / "copy") == before


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_state_file(stopped: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(stopped / "run", tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        (checkpoint / name).unlink()
    before = tree(tmp_path / "run")
    assert resume(stopped, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert name in said and "no checkpoint is whole" in said, said
    assert tree(tmp_path / "run") == before


def test_what_may_change(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(stopped / "run", tmp_path / "run")
    free = {"training__steps": 5, "training__validate_every": 3, "training__save_every": 1, "training__keep": 1}
    assert resume(stopped, tmp_path / "run", **free) == 0, capsys.readouterr().err
    assert session.steps(tmp_path / "run") == 5
    shutil.copytree(stopped / "run", tmp_path / "faster")
    changes = {"optimizer__learning_rate": 0.001, "accept_changes": "optimizer.learning_rate", "training__steps": 5}
    assert resume(stopped, tmp_path / "faster", **changes) == 0, capsys.readouterr().err


def test_another_process_on_the_same_run(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlxlora.training.lock import RunLock

    shutil.copytree(stopped / "run", tmp_path / "run")
    lock = RunLock.take(tmp_path / "run")
    try:
        assert resume(stopped, tmp_path / "run") == 2
        assert "is in use: process" in capsys.readouterr().err
    finally:
        lock.release()
