"""What the functions of a format are handed: what to write or read, where, and with which options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlxlora.errors import ConfigError
from mlxlora.progress import Progress

Options = TypeVar("Options")


@dataclass(frozen=True, slots=True)
class Job:
    """What the functions of a format are handed.

    out:     where to write: a scratch directory or file of the final name, published by rename afterwards
    options: the option groups that were given; ask for one with `option(Type)`
    """

    out: Path
    model: str | None
    options: tuple[Any, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False
    on_progress: Progress | None = None

    def option(self, kind: type[Options]) -> Options:
        """The option group of this type as given, or its defaults."""
        return next((given for given in self.options if isinstance(given, kind)), kind())

    def progress(self, what: str, done: int, total: int) -> None:
        """Report progress to whoever listens."""
        if self.on_progress is not None:
            self.on_progress(what, done, total)


@dataclass(frozen=True, slots=True)
class ExportJob(Job):
    """Write `model` (a directory or hub id), with `adapter` (`PATH` or `PATH=SCALE`, any number), to `out`.

    any_base: take adapters that were made for another model, as long as all shapes fit
    target:   where `out` will be published
    """

    adapter: tuple[str, ...] = ()
    any_base: bool = False
    target: Path = field(default_factory=Path)

    @property
    def base(self) -> str:
        """The model; an export always has one."""
        assert self.model is not None
        return self.model


@dataclass(frozen=True, slots=True)
class ImportJob(Job):
    """Read `source` into `out`; `model` is the base that an adapter belongs to."""

    source: Path = field(default_factory=Path)

    def needs_model(self, title: str) -> str:
        """The base model. Raises ConfigError when none was given, for formats that cannot be read without."""
        if self.model is None:
            raise ConfigError(f"Reading a {title} needs the base model it belongs to: give it with --model.")
        return self.model
