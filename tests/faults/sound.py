"""A folder for the sound files that damage begins with: made once in a process, and gone when it ends."""

import functools
import tempfile
from pathlib import Path


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mlxlora-sound-")


def scratch() -> Path:
    """The folder of this process."""
    return Path(_folder().name)
