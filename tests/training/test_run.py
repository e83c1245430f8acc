"""The run directory: whole or not at all, one writer, and back to the last whole checkpoint."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.errors import RunError, TrainingError
from mlxlora.files import save_safetensors
from mlxlora.training import run as run_module
from mlxlora.training.checkpoint import FILES, TrainingState
from mlxlora.training.run import RunDirectory
from tests import tiny

IDENTITY: dict[str, Any] = {"data": "d1", "adapter.rank": 8, "seed": 0, "adapter.targets": ["all-linear"]}


def state(step: int) -> TrainingState:
    return TrainingState(
        step=step,
        epoch=step // 10,
        position=step % 10,
        adapter={"layers.0.lora_a": mx.full((3, 2), step / 3), "b": mx.array([1.5, -0.0], dtype=mx.bfloat16)},
        optimizer={"step": mx.array(step, dtype=mx.uint64), "layers.0.lora_a.m": mx.full((3, 2), 1e-30)},
        counters={"best_loss": 0.1 + 0.2, "tokens": 12345678901, "patience": None, "worst": float("inf")},
    )


def same(one: TrainingState, other: TrainingState) -> bool:
    def raw(part: dict[str, mx.array]) -> dict[str, tuple[Any, Any, bytes]]:
        return {name: (a.dtype, a.shape, np.array(a.reshape(-1).view(mx.uint8)).tobytes()) for name, a in part.items()}

    plain = [(s.step, s.epoch, s.position, s.counters) for s in (one, other)]
    return (
        plain[0] == plain[1] and raw(one.adapter) == raw(other.adapter) and raw(one.optimizer) == raw(other.optimizer)
    )


def save(run: RunDirectory, step: int, *, best: bool = False, keep: int = 2) -> Path:
    now = state(step)
    return run.save(
        now, adapter_writer=lambda d: save_safetensors(d / "adapters.safetensors", now.adapter), best=best, keep=keep
    )


def begin(path: Path, steps: tuple[int, ...] = (), *, overwrite: bool = False) -> None:
    with RunDirectory.open(path, identity=IDENTITY, overwrite=overwrite) as run:
        run.write_config("a: 1\n")
        for step in steps:
            save(run, step, best=step == 20)


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_save_and_latest_are_exact(tmp_path: Path) -> None:
    begin(tmp_path / "run", (10, 20, 30))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "adapter", "best", "checkpoints", "config.yaml", "run.json",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-0000020", "step-0000030"]
    with RunDirectory.open(tmp_path / "run", identity=IDENTITY) as run:
        found = run.latest()
        assert found is not None and same(found, state(30)) and not run.notices
    best = tiny.tensors(tmp_path / "run" / "best" / "adapters.safetensors")
    assert mx.array_equal(best["layers.0.lora_a"], state(20).adapter["layers.0.lora_a"]).item()


def test_a_new_run_has_nothing_and_leaves_nothing_unless_begun(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "deep" / "run", identity=IDENTITY) as run:
        assert run.latest() is None
    assert not (tmp_path / "deep" / "run").exists()
    with pytest.raises(RuntimeError, match="write_config"), RunDirectory.open(tmp_path / "r", identity=IDENTITY) as run:
        save(run, 1)


def test_changed_identity_names_every_field(tmp_path: Path) -> None:
    begin(tmp_path / "run", (10,))
    before = tree(tmp_path / "run")
    with pytest.raises(RunError) as caught:
        RunDirectory.open(tmp_path / "run", identity={**IDENTITY, "adapter.rank": 16, "data": "d2", "new": 1})
    text = str(caught.value)
    assert "adapter.rank: was 8, is now 16" in text and "data: was d1, is now d2" in text
    assert "new: was (not set), is now 1" in text and len(caught.value.problems) == 3
    assert tree(tmp_path / "run") == before


def test_finished_runs_and_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "run"
    begin(path, (10, 20))
    (path / "notes.txt").write_text("mine")
    with RunDirectory.open(path, identity=IDENTITY) as run:
        run.finish({"loss": 0.5})
    assert json.loads((path / "run.json").read_text())["summary"] == {"loss": 0.5}
    before = tree(path)
    for refuse in (lambda: RunDirectory.look(path), lambda: RunDirectory.open(path, identity=IDENTITY)):
        with pytest.raises(RunError, match=r"finished run.*--overwrite"):
            refuse()
    RunDirectory.look(path, overwrite=True)
    with RunDirectory.open(path, identity={"seed": 1}, overwrite=True) as run:
        assert run.latest() is None
    assert tree(path) == before  # cleared only when everything else is known to be right
    with RunDirectory.open(path, identity={"seed": 1}, overwrite=True) as run:
        run.write_config("b: 2\n")
    assert sorted(tree(path)) == ["config.yaml", "notes.txt", "run.json"]


def test_foreign_directories_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(RunError, match=r"no run directory.*config\.json"):
            RunDirectory.open(tmp_path / "model", identity=IDENTITY, overwrite=overwrite)
        with pytest.raises(RunError, match="no run directory"):
            RunDirectory.look(tmp_path / "model", overwrite=overwrite)
    assert tree(tmp_path / "model") == {"config.json": b"{}"}


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_passed_over_or_refused(tmp_path: Path, name: str, damage: str) -> None:
    begin(tmp_path / "run", (10, 20))
    file = tmp_path / "run" / "checkpoints" / "step-0000020" / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.unlink() if damage == "remove" else file.write_bytes(raw if damage == "flip" else raw[:-1])
    with RunDirectory.open(tmp_path / "run", identity=IDENTITY) as run:
        found = run.latest()
        assert found is not None and same(found, state(10))
        assert len(run.notices) == 1 and "step-0000020" in run.notices[0]
        run.write_config("a: 1\n")
        save(run, 15)  # what the damaged past left beyond goes
        assert [p.name for p in run.checkpoints()] == ["step-0000010", "step-0000015"]
    for left in (tmp_path / "run" / "checkpoints").iterdir():
        (left / name).unlink()
    before = tree(tmp_path / "run")
    with (
        RunDirectory.open(tmp_path / "run", identity=IDENTITY) as run,
        pytest.raises(RunError, match="no checkpoint is whole"),
    ):
        run.latest()
    assert tree(tmp_path / "run") == before


def test_checkpoints_of_another_run_and_missing_ones_are_refused(tmp_path: Path) -> None:
    begin(tmp_path / "run", (10,))
    with RunDirectory.open(tmp_path / "other", identity={"seed": 1}) as run:
        run.write_config("")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "other" / "checkpoints")
    with (
        RunDirectory.open(tmp_path / "other", identity={"seed": 1}) as run,
        pytest.raises(RunError, match="another run"),
    ):
        run.latest()
    with (
        RunDirectory.open(tmp_path / "run", identity=IDENTITY) as run,
        pytest.raises(RunError, match="missing or empty"),
    ):
        run.latest()


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    begin(tmp_path / "run", (10,))
    lines = [json.dumps({"event": "step", "step": n}) + "\n" for n in range(1, 14)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines) + '{"event": "st')
    with RunDirectory.open(tmp_path / "run", identity=IDENTITY) as run:
        run.latest()
        assert run.metrics_path.read_text() == "".join(lines[:10])
    begin(tmp_path / "early")
    (tmp_path / "early" / "metrics.jsonl").write_text(
        '{"event": "validation", "step": 0}\n{"event": "step", "step": 1}\n'
    )
    with RunDirectory.open(tmp_path / "early", identity=IDENTITY) as run:
        assert run.latest() is None and run.metrics_path.read_text() == ""


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "run", (10,))
    before = tree(tmp_path / "run")
    with RunDirectory.open(tmp_path / "run", identity=IDENTITY) as run:
        run.write_config("a: 1\n")

        def full(directory: Path) -> None:
            (directory / "adapters.safetensors").write_bytes(b"part")
            raise OSError(28, "No space left on device")

        with pytest.raises(TrainingError, match=r"ran full.*A save takes .*step-0000010"):
            run.save(state(20), adapter_writer=full, best=True, keep=1)
        monkeypatch.setattr(run_module, "HEADERS", 10**16)
        with pytest.raises(TrainingError, match=r"room for the checkpoint of step 20: .* are needed, .* are free"):
            save(run, 20)
        with pytest.raises(TrainingError, match="room for this run's checkpoints: "):
            run.require_space(state(20), keep=3)
    assert tree(tmp_path / "run") == before


HOLD = """
import sys, time
from pathlib import Path
from mlxlora.training.lock import RunLock
lock = RunLock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_one_writer_and_the_lock_of_the_dead(tmp_path: Path) -> None:
    begin(tmp_path / "run", (10,))
    before = tree(tmp_path / "run")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=rf"in use: process {holder.pid} on"):
            RunDirectory.look(tmp_path / "run")
        with pytest.raises(RunError, match=rf"in use: process {holder.pid} on"):
            RunDirectory.open(tmp_path / "run", identity=IDENTITY)
        assert holder.poll() is None  # it was not waited for
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / "run" / ".lock").exists()
    RunDirectory.look(tmp_path / "run")
    with RunDirectory.open(tmp_path / "run", identity=IDENTITY) as run:
        assert run.latest() is not None
        with pytest.raises(RunError, match=f"process {os.getpid()}"):
            RunDirectory.open(tmp_path / "run", identity=IDENTITY)
    assert tree(tmp_path / "run") == before


FORK = HOLD.replace('print("held", flush=True)', 'import os; child = os.fork(); os.write(1, f"{child}\\n".encode())')


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", FORK, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    said = {holder.stdout.readline().strip(), holder.stdout.readline().strip()}
    child = int((said - {"0"}).pop())
    try:
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives, and once had the lock's file open
        RunDirectory.open(tmp_path / "run", identity=IDENTITY).close()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


@pytest.mark.parametrize("stage", range(5))
def test_a_kill_while_a_finished_run_is_cleared_leaves_one_that_only_overwrite_touches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    path = tmp_path / "run"
    begin(path, (10, 20))
    with RunDirectory.open(path, identity=IDENTITY) as run:
        run.finish({})
    left = iter(range(stage))

    def remove(target: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        shutil.rmtree(target)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "remove_directory", remove)
        with contextlib.suppress(KeyboardInterrupt):
            begin(path, overwrite=True)
    if stage < 3:  # checkpoints/, best/ and adapter/ are not all gone yet
        with pytest.raises(RunError, match="finished run"):
            RunDirectory.open(path, identity=IDENTITY)
    begin(path, (5,), overwrite=True)
    with RunDirectory.open(path, identity=IDENTITY) as run:
        found = run.latest()
        assert found is not None and found.step == 5 and not run.best_path.exists()


def test_what_a_run_chose_is_there_when_it_goes_on(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run", identity=IDENTITY) as run:
        assert run.chosen == {}
        run.chosen = {"batch_size": 2, "accumulate": 2}
        run.write_config("")
        save(run, 1)
    with RunDirectory.open(tmp_path / "run", identity=IDENTITY) as run:
        assert run.chosen == {"batch_size": 2, "accumulate": 2}
        run.write_config("")
        save(run, 2)
    with RunDirectory.open(tmp_path / "run", identity=IDENTITY, overwrite=True) as run:
        assert run.chosen == {}
