"""Files and directories that appear whole or not at all.

Everything that mlxlora publishes goes through `new_directory`, `new_file` or `write_whole`: written as scratch
beside its place, flushed to the disk, then renamed. A directory that replaces another is exchanged with it in
one system call where the system can (Linux: renameat2, macOS: renamex_np), so a reader always finds one of the two.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxlora.errors import InputError
from mlxlora.files.places import refuse_unmakeable
from mlxlora.files.space import room_for
from mlxlora.files.tensors import check_safetensors

SCRATCH = ".tmp-"  # in the name of everything that is not published yet


def sync(path: Path) -> None:
    """Flush one file or directory entry to the disk (macOS: to the platter, which `fsync` alone does not promise)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            try:
                fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            except OSError:  # a file system that knows only the common flush, such as one over the network
                os.fsync(handle)
        else:
            os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot: nothing more to be done
            raise
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Flush every file below `directory`, and the directories themselves."""
    for root, _, names in os.walk(directory):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


@contextlib.contextmanager
def new_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a scratch directory that becomes `target` by rename when the block ends without an error.

    Before it is published, the header of every safetensors file in it is checked. With `replace`, a reader finds
    the old directory or the new one at every moment (see `exchange`).

    Raises InputError when `target` exists (unless `replace`; an empty directory counts as absent), DiskFullError when
    the disk runs full. On any error the scratch directory is removed and `target` is as it was.
    """
    target = Path(target)
    if not replace:
        refuse_existing(target)
    elif target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} is not a directory. Remove it first.")
    with scratch_directory(target) as scratch:
        scratch.chmod(0o755)
        yield scratch
        for file in scratch.rglob("*.safetensors"):
            check_safetensors(file)
        sync_tree(scratch)
        publish(scratch, target)


@contextlib.contextmanager
def new_file(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a path of the same name in a scratch directory; the file written there becomes `target` by rename.

    Raises InputError when `target` exists (unless `replace`), DiskFullError when the disk runs full. On any error
    nothing is left behind, and `target` is as it was.
    """
    target = Path(target)
    if not replace:
        refuse_existing(target)
    with scratch_directory(target) as folder:
        path = folder / target.name
        yield path
        sync(path)
        path.replace(target)
        sync(target.parent)


@contextlib.contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """Yield a directory beside `target` for the work on it, gone when the block ends.

    A process that is killed leaves its own behind; the next that works on the same target removes it.
    Raises DiskFullError when the disk runs full.
    """
    target = Path(target)
    with room_for(target), _place_for(target):
        sweep_scratch(target.parent, f".{target.name}{SCRATCH}")
        with _beside(target) as scratch, room_for(target, scratch):
            yield scratch


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, gone at the end; it is locked, which says to others that its owner lives."""
    while True:
        made = _scratch_name(target)
        try:
            made.mkdir(mode=0o700)
            with _locked(made, wait=True) as held:
                if held and made.exists():  # else somebody swept it before it was locked
                    yield made
                    return
        finally:
            _clear(made, target)


def _scratch_name(target: Path) -> Path:
    """A new name beside `target`: known before anything is made, so that a signal just then leaves nothing behind."""
    return target.with_name(f".{target.name}{SCRATCH}{secrets.token_hex(6)}")


def _clear(scratch: Path, target: Path) -> None:
    """Remove a scratch directory; where `target` was moved aside into it and nothing came in its place, put it back."""
    old = scratch / "old"
    if old.is_dir() and not target.exists() and len(list(scratch.iterdir())) == 1:
        old.rename(target)
    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _place_for(target: Path) -> Iterator[None]:
    """Make the directories above `target`; where nothing comes of it, those that were made go again."""
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else's file stands there by now
            for parent in made:
                parent.rmdir()
        raise


def publish(scratch: Path, target: Path) -> None:
    """Put the directory `scratch` in the place of `target`; what stood there is `scratch` then, or gone."""
    if target.is_dir() and any(target.iterdir()):
        if exchange(scratch, target):
            sync(target.parent)
            return
        # No exchange on this file system: for the time between two renames the old one stands under
        # `.target.tmp-…/old`, from where `_clear` brings it back, be it that of the next who works on this target.
        with _beside(target) as aside:
            target.rename(aside / "old")
            scratch.rename(target)
            sync(target.parent)
    else:
        scratch.rename(target)  # an empty directory is replaced by the rename itself
        sync(target.parent)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two directory entries in one system call; False where system or file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(one), os.fsencode(other))
    if sys.platform == "darwin":
        rename_swap = 0x2
        failed = library.renamex_np(names[0], names[1], ctypes.c_uint(rename_swap))
    elif hasattr(library, "renameat2"):
        at_cwd, rename_exchange = -100, 0x2
        failed = library.renameat2(at_cwd, names[0], at_cwd, names[1], ctypes.c_uint(rename_exchange))
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def sweep_scratch(parent: Path, prefix: str = ".") -> list[Path]:
    """Remove the scratch of dead processes in `parent`, and return what was removed.

    What has a living owner, who holds a lock on it, stays. A directory that was moved aside and whose successor
    never came is put back.
    """
    removed = []
    for path in sorted(Path(parent).iterdir()):
        if not path.name.startswith(prefix) or SCRATCH not in path.name:
            continue
        try:
            if path.is_symlink():  # not ours: what it leads to stays
                path.unlink()
                continue
            with _locked(path, wait=False) as held:
                if not held:
                    continue
                if path.is_dir():
                    _clear(path, path.with_name(path.name[1:].rsplit(SCRATCH, 1)[0]))
                else:
                    path.unlink()
        except (FileNotFoundError, PermissionError):  # another process sweeps here too; or it is another person's
            continue
        removed.append(path)
    return removed


@contextlib.contextmanager
def _locked(scratch: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock on scratch; False where another process does (without `wait`), or it is gone."""
    try:
        handle = os.open(scratch, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that somebody put there is not waited for
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = True
    except BlockingIOError:
        held = False
    try:
        yield held
    finally:
        os.close(handle)


def remove_directory(path: Path) -> None:
    """Remove a published directory so that nobody sees it half removed: renamed to scratch, then deleted."""
    path = Path(path)
    with _beside(path) as aside:
        path.rename(aside / "removed")


def refuse_existing(target: Path) -> None:
    """Raise InputError when `target` is a file or a directory with something in it, or cannot be made."""
    target = Path(target)
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    refuse_unmakeable(target)
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists already. Choose another place, or remove it first.")


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file, whole or not at all, over what stands there. Raises DiskFullError when the disk runs full.

    Its scratch is a locked file, not a directory: the rename that publishes it leaves nothing to be cleared up.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with room_for(path), _place_for(path):
        sweep_scratch(path.parent, f".{path.name}{SCRATCH}")
        published = False
        while not published:
            scratch = _scratch_name(path)
            try:
                with scratch.open("xb") as file, _locked(scratch, wait=True) as held:
                    if held and scratch.exists():  # else somebody swept it before it was locked
                        file.write(data)
                        file.flush()
                        sync(scratch)
                        scratch.replace(path)
                        published = True
            finally:
                scratch.unlink(missing_ok=True)
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
