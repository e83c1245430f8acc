"""Files that appear whole or not at all, and files that are read with care.

Everything that mlxlora publishes goes through `new_directory` or `write_whole`: written beside its place under another
name, flushed to the disk, then renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxlora.errors import InputError


def sync(path: Path) -> None:
    """Flush one file or directory entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
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

    Raises InputError when `target` exists (unless `replace`; an empty directory counts as absent).
    On any error the scratch directory is removed and `target` is as it was.
    """
    target = Path(target)
    if not replace:
        refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        sync_tree(scratch)
        if target.is_dir():
            if replace and any(target.iterdir()):
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
                target.rename(old / "old")
                scratch.rename(target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                scratch.rename(target)  # an empty directory is replaced by the rename itself
        else:
            scratch.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def refuse_existing(target: Path) -> None:
    """Raise InputError when `target` is a file or a directory with something in it."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists already. Choose another place, or remove it first.")


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file by way of a scratch file and a rename."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
        sync(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises InputError that names the file and the line."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}.") from None
    except RecursionError:
        raise InputError(f"{path}: JSON nested too deeply.") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
