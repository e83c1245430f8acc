"""The command `mlxlora` from its first moment: until the package is imported, a signal ends it with one line.

A module of its own beside the package, because whoever imports a part of a package imports the whole of it first, and
that takes half a second.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def command() -> int:
    """What the shell calls. Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # what `nohup` has ignored stays ignored
            signal.signal(number, end_at_once)
    from mlxlora import cli

    return cli.command()


def end_at_once(signum: int, frame: FrameType | None) -> None:
    """Nothing is begun yet that would have to be cleared up; an exception would meet modules that are half made."""
    said = "interrupted" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}"
    try:
        os.write(2, f"{said}\n".encode())
    finally:  # though nobody may listen any more
        os._exit(128 + signum)
