"""What each verb did, as a few named views that two commands are compared by."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxlora import cli, flags
from mlxlora.errors import MlxLoraError
from mlxlora.serve import Server
from tests.options import watch_learning, watch_using
from tests.options.calls import Call, Stop, Views, parser_of
from tests.options.place import Place


def see(place: Place, verb: str, options: dict[str, str], eye: str) -> Views:
    """Run `verb` with these options on `place`, and look with `eye` (a name of EYES). A refusal is the one view."""
    parser, function = parser_of(verb)
    positional = cli.VERBS[verb].positional
    words: list[str] = []
    for name, value in options.items():
        many = name in positional or "list[" in flags.kind_of(parser._option_string_actions.get(f"--{name}"))
        filled = [place.filled(word) for word in (value.split(" ") if many else [value])]
        words = [*filled, *words] if name in positional else [*words, f"--{name}", *filled]
    try:
        arguments = flags.parse(parser, flags.normalise(parser, words))
        for name in ("json", "config"):
            arguments.pop(name, None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)  # only slow here
            return EYES[eye](place, function, arguments, patch)
    except MlxLoraError as error:
        return {"refused": re.sub(re.escape(str(place.folder)) + r"\S*", "PATH", str(error))}


# ---- what any verb asks of what lies below it -----------------------------------------------------------------------


def asks_the_hub(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """With which name and revision a model is looked for."""
    asked: list[Any] = []

    def find(source: Any, *, revision: str | None = None) -> Path:
        asked.append((str(source), revision))
        raise Stop

    patch.setattr("mlxlora.hub.find", find)
    with pytest.raises(Stop):
        function(**arguments)
    return {"asked": asked}


def asks_for_samples(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """With which options rows are made to samples."""
    asked: list[Any] = []

    def load_data(data: Any, tokenizer: Any, samples: Any, **more: Any) -> None:
        asked.append(samples)
        raise Stop

    patch.setattr(sys.modules[function.__module__], "load_data", load_data)
    with pytest.raises(Stop):
        function(**arguments)
    return {"asked": asked}


def runs_own_code(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """Whether Python files of the model run. What comes of it does not matter: a model of that kind is no good."""
    patch.setattr(sys, "stdin", io.StringIO(""))
    patch.setattr(Server, "wait", lambda self: None)
    with contextlib.suppress(MlxLoraError):
        function(**arguments)
    return {"ran": (Path(arguments["model"]) / "it-ran").exists()}


EYES: dict[str, Callable[[Place, Call, Views, pytest.MonkeyPatch], Views]] = {
    function.__name__: function
    for function in (
        asks_the_hub, asks_for_samples, runs_own_code,
        watch_learning.train, watch_learning.trains_by, watch_learning.goes_on, watch_learning.plan,
        watch_learning.tune, watch_learning.check, watch_learning.convert_data,
        watch_using.result, watch_using.compare, watch_using.answers, watch_using.chat, watch_using.serve,
        watch_using.binds, watch_using.writes, watch_using.checks, watch_using.uploads, watch_using.reports,
        watch_using.demo,
    )
}  # fmt: skip
