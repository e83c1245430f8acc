"""A run whose directory is renamed or taken away while it trains."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxlora import cli
from mlxlora.errors import RunError, TrainingError
from mlxlora.files import sha256
from mlxlora.finetune import finetune
from mlxlora.reporting.watch import FinetuneResult
from mlxlora.training.checkpoint import write_checkpoint
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Control, Event, Notice, Step, Validation
from mlxlora.training.lock import RunLock
from tests import tiny
from tests.faults import session

STEPS = TrainingConfig(steps=4, save_every=1, validate_every=2, sample_every=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gone")
    tiny.model_directory(folder / "model", "llama")
    tiny.chats(folder / "rows.jsonl", 20)
    return folder


def train(place: Path, out: Path, hear: Callable[[Event], None], control: Control | None = None) -> FinetuneResult:
    data = [str(place / "rows.jsonl")]
    return finetune(str(place / "model"), data, out, training=STEPS, on_event=hear, control=control)


@pytest.fixture(scope="module")
def calm(place: Path) -> Path:
    train(place, place / "calm", lambda _: None)
    return place / "calm"


@pytest.mark.parametrize("when", [Step, Validation])
def test_nothing_is_made_where_it_stood(when: type[Event], place: Path, tmp_path: Path) -> None:
    """Not a part of a run without its run.json, which no command would take."""
    out = tmp_path / "runs" / "one"

    def take_away(event: Event) -> None:
        if isinstance(event, when) and event.step == 2 and out.exists():
            shutil.rmtree(out.parent)

    with pytest.raises(TrainingError, match="is no longer there: it was deleted, or moved to another disk"):
        train(place, out, take_away)
    assert not out.parent.exists()


@pytest.mark.parametrize("when", [Step, Validation])
def test_a_run_goes_on_where_it_was_moved_to(when: type[Event], place: Path, calm: Path, tmp_path: Path) -> None:
    out, elsewhere, events = tmp_path / "one", tmp_path / "else" / "where", []
    elsewhere.parent.mkdir()

    def move(event: Event) -> None:
        events.append(event)
        if isinstance(event, when) and event.step == 2:
            out.rename(elsewhere)

    result = train(place, out, move)
    assert [e.message for e in events if isinstance(e, Notice)] == [
        f"{out} was moved to {elsewhere}: the run goes on there"
    ]
    assert (result.reason, result.run, result.adapter) == ("done", elsewhere, elsewhere / "best")
    assert not out.exists() and not (elsewhere / ".lock").exists()
    assert session.told(elsewhere) == session.told(calm)
    for name in ("adapter", "best"):
        assert sha256(elsewhere / name / "adapters.safetensors") == sha256(calm / name / "adapters.safetensors")
    with pytest.raises(RunError, match="finished"):
        train(place, elsewhere, lambda _: None)


def test_a_stop_tells_the_command_with_the_new_place(place: Path, calm: Path, tmp_path: Path) -> None:
    out, elsewhere, control = tmp_path / "one", tmp_path / "elsewhere", Control()

    def move(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            out.rename(elsewhere)
            control.stop()

    result = train(place, out, move, control)
    assert "the same command with its new place goes on from here" in str(result)
    said = str(result).splitlines()[-1].removeprefix("next: mlxlora ")
    assert cli.main(shlex.split(said)) == 0 and not out.exists()
    assert session.told(elsewhere) == session.told(calm)


def test_a_move_in_the_midst_of_a_save(
    place: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, elsewhere = tmp_path / "one", tmp_path / "elsewhere"

    def moved(*arguments: Any) -> None:
        if out.exists():
            out.rename(elsewhere)
        write_checkpoint(*arguments)

    monkeypatch.setattr("mlxlora.training.run.write_checkpoint", moved)
    assert train(place, out, lambda _: None).run == elsewhere
    assert not out.exists() and session.told(elsewhere) == session.told(calm)
    assert sorted(path.name for path in elsewhere.iterdir()) == sorted(path.name for path in calm.iterdir())


def test_another_run_in_its_old_place_is_left_alone(place: Path, calm: Path, tmp_path: Path) -> None:
    """Neither its files nor its lock."""
    out, elsewhere, others = tmp_path / "one", tmp_path / "elsewhere", []

    def move(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            out.rename(elsewhere)
            others.append(RunLock.take(out))
            shutil.copy(elsewhere / "run.json", out)

    train(place, out, move)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "run.json"]
    with pytest.raises(RunError, match="in use"):
        RunLock.refuse_held(out)
    others[0].release()
    assert session.told(elsewhere) == session.told(calm)


def test_macos_is_asked_for_the_name_of_an_open_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fcntl(fd, F_GETPATH, char[MAXPATHLEN])` with `F_GETPATH` 50 (sys/fcntl.h), MAXPATHLEN 1024 (sys/syslimits.h)."""
    lock = RunLock.take(tmp_path / "rün")
    answers = [tmp_path / "elsewhere", tmp_path / "rün", tmp_path / "further"]  # the second is none: it is another's

    def control(handle: int, command: int, buffer: bytes) -> bytes:
        assert command == 50 and len(buffer) == 1024 and os.fstat(handle)
        return os.fsencode(answers.pop(0)).ljust(1024, b"\0")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_GETPATH", 50, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    assert lock.place() == tmp_path / "rün"
    lock.path.parent.rename(tmp_path / "elsewhere")
    (tmp_path / "rün").mkdir()
    assert lock.place() == tmp_path / "elsewhere"
    (tmp_path / "elsewhere").rename(tmp_path / "further")
    assert lock.place() is None
    lock.release()
    assert not answers and not (tmp_path / "further").exists()  # it was made for the lock, and nothing is in it
