"""Directories and files appear whole or not at all."""

import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

import mlxlora.files.publish as publishing
from mlxlora.errors import DiskFullError, FormatError, InputError, Signalled
from mlxlora.files import new_directory, new_file, require_space, scratch_directory, sweep_scratch, write_whole


def content(path: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in path.iterdir()}


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert content(tmp_path / "out") == {"a": "1"}
    with pytest.raises(InputError, match="exists already"), new_directory(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_everything_as_it_was(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "out", replace=True) as scratch:
        (scratch / "a").write_text("2")
        raise KeyboardInterrupt
    assert content(tmp_path / "out") == {"a": "1"} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("new", [publishing.new_directory, publishing.new_file])
def test_directories_above_go_again_if_nothing_comes_of_it(tmp_path: Path, new: Any) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError), new(tmp_path / "there" / "a" / "b" / "target"):
        raise RuntimeError
    assert list((tmp_path / "there").iterdir()) == []
    with pytest.raises(RuntimeError), new(tmp_path / "there" / "a" / "b" / "target"):
        (tmp_path / "there" / "a" / "of somebody").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "there" / "a").iterdir()] == ["of somebody"]


def test_a_truncated_safetensors_file_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(FormatError), new_directory(tmp_path / "out") as scratch:
        (scratch / "w.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert not list(tmp_path.iterdir())


def test_a_reader_always_finds_a_whole_directory_while_it_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with new_directory(target) as scratch:
        (scratch / "n").write_text("0")
    if not publishing.exchange(target, _made(tmp_path / "probe", "0")):
        pytest.skip("this file system cannot exchange directories")
    missing, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                (target / "n").read_text()
            except FileNotFoundError as error:
                missing.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        with new_directory(target, replace=True) as scratch:
            (scratch / "n").write_text(str(number))
    stop.set()
    reader.join()
    assert not missing and content(target) == {"n": "99"}


def _made(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "n").write_text(text)
    return path


def test_without_exchange_the_old_one_comes_back_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "exchange", lambda one, other: False)
    _made(tmp_path / "adapter", "old")
    with new_directory(tmp_path / "adapter", replace=True) as scratch:
        (scratch / "n").write_text("new")
    assert content(tmp_path / "adapter") == {"n": "new"} and len(list(tmp_path.iterdir())) == 1
    # what a kill between the two renames leaves
    (tmp_path / ".adapter.tmp-1").mkdir()
    (tmp_path / "adapter").rename(tmp_path / ".adapter.tmp-1" / "old")
    _made(tmp_path / ".adapter.tmp-2", "newer, not known to be whole")
    sweep_scratch(tmp_path)
    assert content(tmp_path / "adapter") == {"n": "new"} and len(list(tmp_path.iterdir())) == 1


def test_scratch_of_the_dead_is_swept_and_of_the_living_kept(tmp_path: Path) -> None:
    dead = _made(tmp_path / ".out.tmp-dead", "x")  # of a process that was killed a moment ago
    other = _made(tmp_path / ".other.tmp-dead", "x")
    with new_directory(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
        assert not dead.exists() and other.exists()
        with new_file(tmp_path / "out", replace=True) as second:  # on the same target at the same time
            second.touch()
            assert scratch.exists()
            write_whole(tmp_path / "out", "x")
            assert scratch.exists() and second.exists()
        (tmp_path / "out").unlink()
        sweep_scratch(tmp_path)
        assert scratch.exists() and not other.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_scratch_that_is_swept_before_its_lock_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir
    made: list[Path] = []

    def swept(path: Path, *arguments: Any, **options: Any) -> None:
        make(path, *arguments, **options)
        if ".tmp-" not in path.name:
            return
        made.append(path)
        if len(made) == 1:  # another process comes by just then
            assert sweep_scratch(tmp_path) == made

    monkeypatch.setattr(Path, "mkdir", swept)
    with new_directory(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
    assert content(tmp_path / "out") == {"a": "1"} and len(made) == 2


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_signal_at_any_call_leaves_the_old_or_the_new_and_nothing_else(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised as soon as a call that changes the directory has come back."""
    if not exchanges:
        monkeypatch.setattr(publishing, "exchange", lambda one, other: False)
    calls = [0, 0]  # how many there were; which one is the last

    def after(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            calls[0] += 1
            if calls[0] == calls[1]:
                raise Signalled(2)
            return result

        return call

    for name in ("mkdir", "rename", "chmod", "replace"):
        monkeypatch.setattr(Path, name, after(getattr(Path, name)))
    monkeypatch.setattr(publishing, "exchange", after(publishing.exchange))
    seen = set()
    for number in range(1, 12):
        calls[1] = 0
        target = tmp_path / f"{number}" / "out"
        write_whole(target / "n", "old")
        calls[:] = 0, number
        try:
            with new_directory(target, replace=True) as scratch:
                (scratch / "n").write_text("new")
        except Signalled:
            seen.add(number)
        found = (target / "n").read_text()
        assert [path.name for path in target.parent.iterdir()] == ["out"] and found in ("old", "new"), number
        assert found == "new" or number in seen
    assert len(seen) >= 3 and 11 not in seen


@pytest.mark.parametrize("write", [new_file, scratch_directory, new_directory])
def test_what_a_killed_process_left_goes_with_the_next_work_on_the_same_target(tmp_path: Path, write: Any) -> None:
    left = [tmp_path / ".out.tmp-empty", _made(tmp_path / ".out.tmp-full", "x"), tmp_path / ".out.tmp-file"]
    left[0].mkdir()
    left[2].touch()
    with pytest.raises(RuntimeError), write(tmp_path / "out"):
        assert not any(path.exists() for path in left), left
        raise RuntimeError
    _made(tmp_path / ".out.tmp-full", "x")
    write_whole(tmp_path / "out", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_on_its_way_is_nobodys_to_sweep_and_its_rename_is_the_end_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after it leaves nothing."""
    seen: list[list[str]] = []

    def look(path: Path) -> None:
        assert sweep_scratch(tmp_path) == []
        seen.append(sorted(one.name for one in tmp_path.iterdir()))

    monkeypatch.setattr(publishing, "sync", look)
    write_whole(tmp_path / "out", "x")
    assert len(seen) == 2 and seen[0][0].startswith(".out.tmp-") and seen[1] == ["out"]


def test_a_pipe_in_the_place_of_scratch_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".out.tmp-pipe")
    write_whole(tmp_path / "out", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_and_files_are_not_replaced(tmp_path: Path) -> None:
    _made(tmp_path / "real", "x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("x")
    for name in ("link", "file"):
        for replace in (False, True):
            with pytest.raises(InputError), new_directory(tmp_path / name, replace=replace):
                pass
    assert content(tmp_path / "real") == {"n": "x"}


def test_a_full_disk_is_told_with_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DiskFullError, match=r"room for the model: 1000\.0 TB are needed, .* are free"):
        require_space(tmp_path / "not" / "yet", 10**15, "the model")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing, "sync", full)
    with pytest.raises(DiskFullError, match="ran full"), new_directory(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
    (tmp_path / "kept").write_text("old")
    with pytest.raises(DiskFullError, match="ran full"):
        write_whole(tmp_path / "kept", "x")
    monkeypatch.setattr(Path, "mkdir", full)
    for write in (new_directory, new_file, scratch_directory):
        with pytest.raises(DiskFullError, match="ran full"), write(tmp_path / "new"):
            pass
    assert content(tmp_path) == {"kept": "old"}


def test_a_file_in_scratch_that_meets_a_full_disk_is_told_as_what_it_becomes(tmp_path: Path) -> None:
    """Once, by the one who wrote it, and with what there is to tell."""
    told = re.escape(f"{tmp_path / 'm.gguf'}: the disk ran full: ") + r"\d[^,]* are free\. What stood"
    with pytest.raises(DiskFullError, match=told), new_file(tmp_path / "m.gguf") as outer, new_file(outer):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())
