"""Everything that mlxlora raises on purpose.

    MlxLoraError                 exit code 1
    ├── InputError               exit code 2: what was given is wrong; nothing was written
    │   ├── ConfigError          a setting, alone or against another
    │   ├── DataError            rows of a data set, each with file:line
    │   ├── ModelError           a model directory or hub id
    │   ├── AdapterError         an adapter, or an adapter against a model
    │   ├── FormatError          a foreign file that does not hold what its format promises
    │   └── RunError             a run directory: locked, finished, or of another configuration
    ├── UnsupportedError         exit code 2: well-formed, but this cannot be done with it
    ├── DiskFullError            exit code 1: the disk has not the room; nothing half written
    ├── TrainingError            exit code 1: a run that had to stop (not a number, out of memory, disk full)
    └── Interrupted              exit code 128 + signal; the run is saved
    Signalled                    exit code 128 + signal; a KeyboardInterrupt, at once

A message says what was given, where, why it is refused and what to do. Problems of one kind are collected and raised
once: see `Problem` and `InputError.of`.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

SHOWN = 20  # how many problems one message lists


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where it stands, what is wrong with it, and what to do.

    `where` is `file:line` for data, a tensor or field name elsewhere.
    """

    where: str
    what: str
    advice: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        stop = "" if text.endswith((".", "?", "!")) else "."
        return f"{text}{stop} {self.advice}" if self.advice else text


class MlxLoraError(Exception):
    """The root: `except MlxLoraError` catches all that mlxlora raises on purpose."""

    exit_code = 1


class InputError(MlxLoraError):
    """What was given is wrong. Nothing was written."""

    exit_code = 2
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, headline: str, problems: Sequence[Problem]) -> Self:
        """One error for all `problems` (the first 20 are printed, all are kept in `.problems`)."""
        shown = [f"  {problem}" for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            shown.append(f"  … and {len(problems) - SHOWN} more")
        error = cls("\n".join([headline, *shown]))
        error.problems = tuple(problems)
        return error


class ConfigError(InputError):
    """A setting cannot be right, alone or together with another."""


class DataError(InputError):
    """Rows of a data set cannot be used."""


class ModelError(InputError):
    """A model directory or hub id cannot be used."""


class AdapterError(InputError):
    """An adapter is damaged, or does not belong to this model."""


class FormatError(InputError):
    """A foreign file does not hold what its format promises."""


class RunError(InputError):
    """A run directory is in use, finished, or belongs to another configuration."""


class UnsupportedError(MlxLoraError):
    """The input is well-formed, but what was asked cannot be done with it."""

    exit_code = 2


class DiskFullError(MlxLoraError):
    """The disk has not the room for what is to be written. What stood there before is as it was."""


class TrainingError(MlxLoraError):
    """A run had to stop; what it had learned up to the last good step is saved."""


class Interrupted(MlxLoraError):
    """A signal or a callback stopped the run, and the run was saved."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + int(signum)


class Signalled(KeyboardInterrupt):
    """A signal that ends a command at once: no error, so that nothing on its way takes it for one.

    A class of its own, for CPython ends itself by SIGINT, whatever the exit code, once a plain KeyboardInterrupt has
    passed through `exec()`, such as that of an import.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signal.Signals(signum)


def nearest(name: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'?` for a name close to a known one, else an empty string: to end a message with."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
