"""How a verb is called, and what stops it where enough was seen."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from mlxlora import cli, flags

Views = dict[str, Any]
Call = Callable[..., Any]


class Stop(Exception):
    """Thrown where a verb has asked for what is looked at."""


@functools.cache
def parser_of(verb: str) -> tuple[Any, Call]:
    """The parser of a verb, and its function."""
    module, _, name = cli.VERBS[verb].function.partition(":")
    function = getattr(importlib.import_module(module), name)
    return flags.build_parser(function, cli.VERBS[verb].positional), function
