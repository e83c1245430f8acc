"""A disk that runs full at any byte of a save: the last checkpoint stays, nothing is half written, figures are told."""

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlxlora.errors import TrainingError
from mlxlora.files import save_safetensors
from mlxlora.training import run as run_module
from mlxlora.training.checkpoint import TrainingState
from mlxlora.training.run import RunDirectory

COUNT = 50_000  # weights; a save takes 4 * 4 * COUNT bytes and some


def state(step: int) -> TrainingState:
    adapter = {"a": mx.full((COUNT,), step, dtype=mx.float32)}
    return TrainingState(step, 0, step, adapter, {"m": adapter["a"] + 1, "v": adapter["a"] + 2}, {})


def save(run: RunDirectory, step: int, *, by_mlx: bool) -> None:
    now = state(step)

    def write(folder: Path) -> None:
        path = folder / "adapters.safetensors"
        if by_mlx:  # another writer, which reports a full disk in its own way
            mx.save_safetensors(str(path), now.adapter)
        else:
            save_safetensors(path, now.adapter)

    run.save(now, adapter_writer=write, best=True, keep=2)


def tree(path: Path) -> dict[str, bytes]:
    files = (p for p in sorted(path.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A file that grows beyond `size` bytes is refused by the system in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refuse(run: RunDirectory, before: dict[str, bytes], *, by_mlx: bool) -> bool:
    """Try a save that may not fit. Returns whether it was refused, having checked that nothing changed if it was."""
    try:
        save(run, 2, by_mlx=by_mlx)
    except TrainingError as error:
        text = str(error)
        assert "free" in text and ("needed" in text or "A save takes" in text), text
        found = tree(run.path)
        assert found == before, sorted(set(found) ^ set(before))
        latest = run.latest()
        assert (
            latest is not None
            and latest.step == 1
            and mx.array_equal(latest.adapter["a"], state(1).adapter["a"]).item()
        )
        return True
    return False


def begin(path: Path) -> dict[str, bytes]:
    with RunDirectory.open(path, identity={}) as run:
        run.write_config("")
        save(run, 1, by_mlx=False)
    with RunDirectory.open(path, identity={}) as run:
        run.latest()
        run.write_config("")
        return tree(path)


def limits(path: Path, count: int) -> None:
    refused = []
    for number in range(count):
        before = begin(path / f"run-{number}")
        size = round(number / (count - 1) * 9 * COUNT)
        with RunDirectory.open(path / f"run-{number}", identity={}) as run, file_size_limit(size):
            refused.append(refuse(run, before, by_mlx=number % 2 == 1))
    assert refused[0] and not refused[-1] and refused == sorted(refused, reverse=True)
    print(
        f"a limit on the size of a file, at {count} sizes: {sum(refused)} saves refused, nothing changed by any of them"
    )


def small_disk(path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The real thing: a file system of 3 MB, filled up to a few bytes more each time."""
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", path]).returncode:
        pytest.skip("mounting a small file system needs root on Linux")
    try:
        # someone else fills the disk after the free space has been looked at
        monkeypatch.setattr(run_module, "require_space", lambda *_: None)
        before = begin(path / "run")
        refused = 0
        with RunDirectory.open(path / "run", identity={}) as run:
            room = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
            for number in range(count):
                (path / "ballast").write_bytes(bytes(room - round(number / count * 16 * COUNT)))
                refused += refuse(run, before, by_mlx=number % 2 == 1)
                (path / "ballast").unlink()
            assert refused == count
            save(run, 2, by_mlx=False)
        print(f"a file system of 3 MB, full at {count} offsets of a save of {16 * COUNT} bytes: every save undone")
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_full_disk_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits(tmp_path, 8)
    (tmp_path / "disk").mkdir()
    small_disk(tmp_path / "disk", monkeypatch, 10)


@pytest.mark.faults
def test_a_full_disk_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits(tmp_path, 100)
    (tmp_path / "disk").mkdir()
    small_disk(tmp_path / "disk", monkeypatch, 150)


def test_space_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = begin(tmp_path / "run")
    monkeypatch.setattr("mlxlora.files.space.free_space", lambda path: 1_000_000)
    with RunDirectory.open(tmp_path / "run", identity={}) as run:
        with pytest.raises(TrainingError, match=r"the checkpoint of step 2: 4\.\d MB are needed, 1\.0 MB are free"):
            save(run, 2, by_mlx=False)
        with pytest.raises(TrainingError, match=r"this run's checkpoints: \d+\.\d MB are needed, 1\.0 MB are free"):
            run.require_space(state(0), keep=5)
    assert tree(tmp_path / "run") == before
