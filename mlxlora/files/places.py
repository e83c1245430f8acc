"""Places where something is to be written, looked at before the work begins; and what the system says about them."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from mlxlora.errors import ConfigError, InputError, MlxLoraError

# what the system says when the place was wrong, not the machine
WRONG_PLACE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EINVAL, errno.ENOTEMPTY,
}  # fmt: skip


def refuse_unmakeable(target: Path) -> None:
    """Raise InputError when nothing can be written at `target`: a file stands in its way, or it is not allowed."""
    target = Path(target)
    try:
        above = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    except OSError as error:
        raise refusal_of(error) from None
    if not above.is_dir():
        raise InputError(f"{above} is a file, so nothing can be written below it. Choose another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{above} may not be written to. Choose another place, or change its permissions.")


def refuse_no_directory(place: Path, setting: str) -> None:
    """Raise ConfigError unless `place` is a directory, be it one that may only be read, or one can be made there."""
    place = Path(place)
    if place.is_dir():
        return
    try:
        refuse_unmakeable(place / "entry")
    except InputError as error:
        raise ConfigError(f"{setting} is to be a directory: {error}") from None


def refuse_no_page(target: Path) -> None:
    """Raise InputError unless `target` is a place for a page: a mistyped name must not cost somebody's data."""
    target = Path(target)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{target} is to be a page: choose a name that ends in .html.")
    if target.is_dir():
        raise InputError(f"{target} is a directory. Choose the name of a file.")
    refuse_unmakeable(target)


def refusal_of(error: OSError) -> MlxLoraError:
    """What the system refused, said of the place that was meant and not of our scratch beside it.

    An InputError (exit code 2) where another place would do, else a plain MlxLoraError.
    """
    named = error.filename2 or error.filename  # of a failed rename the target
    said = f"{error.strerror or error or type(error).__name__}"
    if named is None or isinstance(named, int):
        return MlxLoraError(f"{said}.")
    path = meant(Path(os.fsdecode(named)))
    if error.errno not in WRONG_PLACE:
        return MlxLoraError(f"{path}: {said}.")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        blocking = next((one for one in (path, *path.parents) if one.exists() and not one.is_dir()), None)
        if blocking is not None:
            return InputError(f"{blocking} is a file, so there is nothing below it. Choose another path.")
    if error.errno == errno.EISDIR:
        return InputError(f"{path} is a directory. Choose the name of a file.")
    return InputError(f"{path}: {said}. Choose another path, or check its permissions.")


def meant(path: Path) -> Path:
    """`path` itself, or the place that it becomes, where it is scratch or lies in it."""
    for number, part in enumerate(path.parts):
        if scratch := re.fullmatch(r"\.(.+)\.tmp-[^.]*", part):
            target = Path(*path.parts[:number], scratch[1])
            below = path.parts[number + 1 :]
            return target.joinpath(
                *(below[1:] if below[:1] == (target.name,) else below)
            )  # a file has its own name there
    return path
