"""What `mlxlora VERB --help` prints: the parser's flags in words for a person, without Python's."""

from __future__ import annotations

import shutil
import textwrap
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from mlxlora.flags import group_of

LEFT = 30  # columns for a flag with its value
NARROW = 60  # below that many columns a flag stands above its text
WORDS = {bool: "true|false", int: "N", float: "NUMBER", str: "TEXT", Path: "PATH", dict: "'{NAME: VALUE}'"}


def page(parser: ArgumentParser, name: str, positional: Sequence[str] = ()) -> str:
    """The help of a verb."""
    width = max(40, min(shutil.get_terminal_size((110, 24)).columns, 110))
    required = [action for action in parser._actions if action.required and action.option_strings]
    stand = [f"{word.upper()}…" if action_of(parser, word).nargs == "+" else word.upper() for word in positional]
    words = [f"usage: mlxlora {name}", *stand, *map(invocation, required), "[options]"]
    lines = textwrap.wrap(" ".join(words), width, subsequent_indent=" " * 8, break_on_hyphens=False)
    for title, actions in sections(parser):
        lines += ["", title]
        for action in actions:
            lines += entry(invocation(action), told(action), width)
    return "\n".join(lines)


def sections(parser: ArgumentParser) -> Iterator[tuple[str, list[Any]]]:
    """Headings with the flags below them: the verb's own first, then each group, what all verbs have last."""
    last = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not is_noise(action)]
        common = [action for action in actions if action.dest in ("config", "json", "help")]
        last += common
        rest = [action for action in actions if action not in common and group_of(action) is None]
        if rest:
            yield heading(str(group.title)), rest
        for action in actions:
            if (kind := group_of(action)) is not None:
                inner = ArgumentParser(exit_on_error=False)
                inner.add_class_arguments(kind, action.dest)
                yield heading(str(action.help)), [one for one in inner._actions if "." in one.dest]
    yield "Of every verb:", last


def heading(title: str) -> str:
    """A title as it stands over its flags."""
    if title == "positional arguments":  # argparse's own
        title = "without a flag"
    title = title.replace("`", "").rstrip(":.")
    return f"{title[:1].upper()}{title[1:]}:"


def is_noise(action: Any) -> bool:
    """Whether a flag is one of jsonargparse's own: a whole group from a file, the help of a class."""
    return type(action).__name__ in ("_ActionConfigLoad", "_ActionHelpClassPath", "ActionConfigLoad")


def action_of(parser: ArgumentParser, name: str) -> Any:
    """The positional value of that name."""
    return next(action for action in parser._actions if action.dest == name)


def invocation(action: Any) -> str:
    """A flag with what it takes."""
    if not action.option_strings:
        return f"{action.dest.upper()}{'…' if action.nargs == '+' else ''}"
    flag = str(next(flag for flag in action.option_strings if flag.startswith("--"))).removesuffix("_")
    if action.dest in ("json", "help"):
        return flag
    kind = getattr(action, "_typehint", None)
    if kind is bool and action.default is False:
        return flag
    return f"{flag} {'FILE' if action.dest == 'config' else value_of(kind)}"


def value_of(kind: Any) -> str:
    """What stands after a flag of this type."""
    origin, parts = get_origin(kind), [part for part in get_args(kind) if part not in (type(None), Ellipsis)]
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin is list:
        return f"{value_of(parts[0])}…"
    if origin is tuple:
        return f"[{', '.join(map(value_of, parts))}]"
    if origin is dict or not parts:
        return WORDS.get(origin or kind, "VALUE")
    return "|".join(dict.fromkeys(value_of(part) for part in parts if part != list[Any]))  # rows: Python alone


def told(action: Any) -> str:
    """What a flag is for, and its default."""
    text = " ".join(str(action.help or "").split()).replace("%%", "%")
    if action.required and action.option_strings:
        return f"{text} (required)"
    default = action.default
    if action.dest in ("json", "help") or default is None or default is False or default in ("", [], {}, SUPPRESS):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
    return f"{text} (default:\N{NO-BREAK SPACE}{shown.lower() if default is True else shown})"


def entry(left: str, right: str, width: int) -> list[str]:
    """A flag beside its text, or above it where it is long or the terminal narrow."""
    indent = 8 if width < NARROW else LEFT + 4
    lines = [line.replace("\N{NO-BREAK SPACE}", " ") for line in textwrap.wrap(right, width - indent)]
    first = lines.pop(0) if lines and width >= NARROW and len(left) <= LEFT else ""
    return [f"  {left:<{LEFT}}  {first}".rstrip(), *(" " * indent + line for line in lines)]
