"""What macOS is asked for, held at its boundary: neither call exists elsewhere, so a stand-in takes the arguments.

Names, types and numbers are Apple's: `int renamex_np(const char *from, const char *to, unsigned int flags)` with
`RENAME_SWAP` 0x2 (sys/stdio.h, since 10.12), and `fcntl(fd, F_FULLFSYNC)` with `F_FULLFSYNC` 51 (sys/fcntl.h).
"""

import ctypes
import errno
import fcntl
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxlora.files import new_directory, write_whole

RENAME_SWAP, F_FULLFSYNC = 0x2, 51


class Library:
    """The C library of a Mac, as far as we call it: swaps for real, through a third name."""

    def __init__(self, fails_with: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails_with = fails_with

    def renamex_np(self, one: bytes, other: bytes, flags: ctypes.c_uint) -> int:
        self.calls.append((one, other, flags))
        if self.fails_with:
            ctypes.set_errno(self.fails_with)
            return -1
        aside = one + b"-aside"
        for source, target in ((one, aside), (other, one), (aside, other)):
            Path(os.fsdecode(source)).rename(os.fsdecode(target))
        return 0


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: library)
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", F_FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda handle, command: os.fstat(handle) and 0)
    return library


def made(path: Path, text: str) -> None:
    with new_directory(path, replace=True) as scratch:
        (scratch / "n").write_text(text)


def test_a_directory_is_swapped_by_one_call(mac: Library, tmp_path: Path) -> None:
    made(tmp_path / "adapter ü", "old")
    made(tmp_path / "adapter ü", "new")
    ((one, other, flags),) = mac.calls
    assert os.fsdecode(other) == str(tmp_path / "adapter ü") and os.fsdecode(one).startswith(str(tmp_path / ".adapter"))
    assert isinstance(one, bytes) and isinstance(flags, ctypes.c_uint) and flags.value == RENAME_SWAP
    assert (tmp_path / "adapter ü" / "n").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EINVAL])
def test_without_the_call_there_are_two_renames(mac: Library, tmp_path: Path, code: int) -> None:
    """A file system that is not APFS."""
    mac.fails_with = code
    made(tmp_path / "adapter", "old")
    made(tmp_path / "adapter", "new")
    assert mac.calls and (tmp_path / "adapter" / "n").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_another_refusal_is_an_error_and_the_old_one_stays(mac: Library, tmp_path: Path) -> None:
    made(tmp_path / "adapter", "old")
    mac.fails_with = errno.EACCES
    with pytest.raises(PermissionError):
        made(tmp_path / "adapter", "new")
    assert (tmp_path / "adapter" / "n").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_what_is_published_is_flushed_to_the_platter(
    mac: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    names = {}
    opened = os.open

    def open_named(path: Any, *more: Any, **options: Any) -> int:
        handle = opened(path, *more, **options)
        names[handle] = Path(path).name
        return handle

    monkeypatch.setattr(os, "open", open_named)
    monkeypatch.setattr(fcntl, "fcntl", lambda handle, command: asked.append((names[handle], command)))
    made(tmp_path / "adapter", "x")
    write_whole(tmp_path / "run.json", "{}")
    assert {command for _, command in asked} == {F_FULLFSYNC}
    assert "n" in [name for name, _ in asked] and [name for name, _ in asked][-1] == tmp_path.name


def test_a_file_system_that_cannot_do_that_is_flushed_as_usual(
    mac: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []

    def refuse(handle: int, command: int) -> int:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", flushed.append)
    made(tmp_path / "adapter", "x")
    assert len(flushed) >= 3  # the file, its directory, and the one above
