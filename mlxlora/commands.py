"""A command of `mlxlora` as a person can paste it into a shell: what a result says comes next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable


def command(verb: str, *words: object, **flags: object) -> str:
    """`mlxlora VERB word … --flag value …`, quoted where a path holds a space or worse. A list is several words."""
    parts = ["mlxlora", *verb.split(), *_words(words)]
    for name, value in flags.items():
        parts += [f"--{name}", *_words([value])]
    return shlex.join(parts)


def _words(values: Iterable[object]) -> list[str]:
    found: list[str] = []
    for value in values:
        found += _words(value) if isinstance(value, list | tuple) else [str(value)]
    return found
