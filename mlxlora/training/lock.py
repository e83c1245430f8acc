"""One writer for a run directory, by a lock that the kernel gives up when its owner dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
import weakref
from pathlib import Path

from mlxlora.errors import RunError

_held: weakref.WeakSet[RunLock] = weakref.WeakSet()
_follows_forks = False


class RunLock:
    """`RUN/.lock`, held. It says in words who holds it; what counts is the kernel's lock (flock) on it."""

    def __init__(self, path: Path, handle: int, created: bool) -> None:
        self.path = path
        self._handle: int | None = handle
        self._directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)  # known by this when its name has changed
        self._created = created
        _held.add(self)
        _close_in_children()

    @classmethod
    def take(cls, directory: Path) -> RunLock:
        """Lock a directory (made when it does not exist). Raises RunError at once when another holds it."""
        created = not directory.exists()
        while True:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / ".lock"
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except FileNotFoundError:  # an owner removed the directory that it had made; make it again
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(handle, path):
                    break
                os.close(handle)  # the owner let go, and removed the file, between our two calls: take the new one
            except BlockingIOError:
                owner = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
                os.close(handle)
                raise _in_use(directory, owner) from None
            except BaseException:
                os.close(handle)
                raise
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # words for a person; the lock holds on a full disk, too
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)
        return cls(path, handle, created)

    @staticmethod
    def refuse_held(directory: Path) -> None:
        """Raise RunError when a living process holds the lock of `directory`. Takes nothing, makes nothing."""
        try:
            handle = os.open(directory / ".lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(directory, os.pread(handle, 200, 0).decode("utf-8", "replace").strip()) from None
        finally:
            os.close(handle)

    def keep_directory(self) -> None:
        """The directory has been written to: `release` leaves it."""
        self._created = False

    def place(self) -> Path | None:
        """Where the locked directory stands by now; None where it was removed, or the system does not tell."""
        if self._stands_at(self.path.parent):
            return self.path.parent
        named = _name_of(self._directory)
        if named is None or not self._stands_at(named):
            return None
        self.path = named / ".lock"
        return named

    def _stands_at(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.fstat(self._directory), path.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Let go. A directory that was made for the lock, and is empty again, is removed."""
        if self._handle is None:
            return
        if directory := self.place():  # else another run may stand there
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)  # before the lock is given up: nobody else's file is removed
            if self._created:
                with contextlib.suppress(OSError):
                    directory.rmdir()
        self._forget()

    def _forget(self) -> None:
        if self._handle is not None:
            os.close(self._directory)
            os.close(self._handle)
            self._handle = None


def _in_use(directory: Path, owner: str) -> RunError:
    return RunError(
        f"{directory} is in use: {owner or 'another process'} trains in it."
        " Wait for it, stop it, or choose another --out."
    )


def _name_of(handle: int) -> Path | None:
    """The path of an open directory, as the system knows it; to be checked."""
    with contextlib.suppress(OSError):
        if sys.platform == "darwin":
            return Path(os.fsdecode(fcntl.fcntl(handle, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")))
        return Path(f"/proc/self/fd/{handle}").readlink()
    return None


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _close_in_children() -> None:
    """A forked child (a data worker) must not keep the lock alive after its parent has been killed."""
    global _follows_forks
    if not _follows_forks:
        os.register_at_fork(after_in_child=_forget_all)
        _follows_forks = True


def _forget_all() -> None:
    for lock in list(_held):
        lock._forget()
