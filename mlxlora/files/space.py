"""Room on the disk: asked for before writing, and told plainly when it runs out."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlxlora.errors import DiskFullError
from mlxlora.files.places import meant

# What a file system says when it takes no more. EFBIG: a limit on one file's size, met in the middle of a write.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def human_bytes(count: int) -> str:
    """`1536` as `1.5 kB`… in steps of 1,000, as disks and the Finder count."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def free_space(path: Path) -> int:
    """Bytes that this user can still write where `path` is, or will be."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(path: Path, needed: int, what: str) -> None:
    """Raise DiskFullError when `needed` bytes for `what` are not free where `path` is, or will be."""
    free = free_space(path)
    if needed > free:
        raise DiskFullError(
            f"{path}: the disk has too little room for {what}: {human_bytes(needed)} are needed,"
            f" {human_bytes(free)} are free. Make room, or choose another place."
        )


@contextlib.contextmanager
def room_for(target: Path, scratch: Path | None = None) -> Iterator[None]:
    """Turn a full disk, met while `target` is written, into a DiskFullError that says what was needed and what is free.

    scratch: where the bytes went so far; its size is what was written when the disk ran full
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_full(error):
            raise
        written = size_of(scratch) if scratch else 0
        free = free_space(target)
        took = (
            f"more than {human_bytes(written + free)} are needed, {human_bytes(free)} are free beside the"
            f" {human_bytes(written)} that were written and are removed again"
        )
        raise DiskFullError(
            f"{meant(target)}: the disk ran full: {took if written else f'{human_bytes(free)} are free'}."
            " What stood there before is as it was. Make room and run the same command again."
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether an error means that the disk took no more (MLX reports it as a RuntimeError)."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return isinstance(error, RuntimeError) and "[write] Unable to write" in str(error)


def size_of(path: Path) -> int:
    """Bytes in a file, or in all files below a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink())
