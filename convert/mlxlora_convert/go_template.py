"""The part of Go's text/template that chat templates for Ollama are written in, to try one before it is shipped.

Text, trim markers, `if`/`else if`/`else`, `range $i, $x := list`, variables, fields, strings, numbers, and the
functions below. Anything else is an error: better not to know than to guess. https://pkg.go.dev/text/template
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|:=|=|[(),|]|\$?\.?[\w.]+|\$')
ACTION = re.compile(r'\{\{(-(?=\s))?((?:"(?:\\.|[^"\\])*"|[^"])*?)((?<=\s)-)?\}\}', re.S)
SPACES = " \t\r\n"  # what trim markers take away: Go's, not Unicode's
ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}


class GoTemplateError(ValueError):
    """A template uses what is not known here, or is malformed."""


def equal(first: Any, *others: Any) -> bool:
    """Whether `first` is one of the others, which have to be of its type."""
    if not others or any(type(other) is not type(first) for other in others):
        raise GoTemplateError("eq and ne compare values of one type")
    return first in others


def listed(value: Any) -> list[Any]:
    """A list: what Go does with texts here goes by bytes, and with numbers by its version."""
    if not isinstance(value, list):
        raise GoTemplateError(f"a list was expected, found {value!r}")
    return value


def printed(value: Any) -> str:
    """A value as an action writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int):
        raise GoTemplateError(f"how {type(value).__name__} is printed is not known here")
    return str(value)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": equal,
    "ne": lambda first, other: not equal(first, other),
    "not": lambda value: not value,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "len": lambda value: len(listed(value)),
    "slice": lambda value, start: listed(value)[start:],
}


@dataclass
class Node:
    """Text; or an action with its words, and what stands in its branches (`if`, `range`)."""

    text: str = ""
    words: list[str] = field(default_factory=list)
    body: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


def render(source: str, data: Mapping[str, Any]) -> str:
    """The text of a template. Raises GoTemplateError for what is not known here."""
    pieces = list(split(source))
    nodes, rest = parse(pieces, 0)
    if rest != len(pieces):
        raise GoTemplateError("'end' or 'else' without a beginning")
    check(nodes, {"$"})
    try:
        return "".join(walk(nodes, [{"$": data}], data))
    except (TypeError, KeyError, IndexError) as error:  # wrong arguments, or a field that is not there
        raise GoTemplateError(f"{type(error).__name__}: {error}") from None


def split(source: str) -> Iterator[str | list[str]]:
    """Text and the words of actions, in turn, trimmed where the actions say so."""
    at, trim = 0, False
    for action in ACTION.finditer(source):
        text = source[at : action.start()]
        text = text.lstrip(SPACES) if trim else text
        yield text.rstrip(SPACES) if action[1] else text
        words = TOKEN.findall(action[2])
        if not words or TOKEN.sub("", action[2]).strip():
            raise GoTemplateError(f"cannot read {action[0]}")
        yield words
        at, trim = action.end(), bool(action[3])
    rest = source[at:].lstrip(SPACES) if trim else source[at:]
    if "{{" in rest:
        raise GoTemplateError("an action is not closed")
    yield rest


def parse(pieces: list[str | list[str]], at: int) -> tuple[list[Node], int]:
    """Nodes up to the `end` or `else` that belongs to somebody further out."""
    nodes: list[Node] = []
    while at < len(pieces):
        piece = pieces[at]
        if isinstance(piece, str):
            nodes.append(Node(text=piece))
            at += 1
        elif piece[0] in ("end", "else"):
            break
        elif piece[0] in ("if", "range"):
            node, at = branch(pieces, at, piece)
            nodes.append(node)
        else:
            nodes.append(Node(words=piece))
            at += 1
    return nodes, at


def branch(pieces: list[str | list[str]], at: int, words: list[str]) -> tuple[Node, int]:
    """One `if` or `range` with its branches."""
    node = Node(words=words)
    node.body, at = parse(pieces, at + 1)
    if at < len(pieces) and pieces[at][0] == "else":
        inner = list(pieces[at][1:])
        if inner:  # else if: an if in the else branch, which shares our end
            other, at = branch(pieces, at, inner)
            node.otherwise = [other]
            return node, at
        node.otherwise, at = parse(pieces, at + 1)
    if at >= len(pieces) or pieces[at] != ["end"]:
        raise GoTemplateError(f"'{' '.join(words)}' without an end")
    return node, at + 1


def check(nodes: list[Node], declared: set[str]) -> None:
    """Raise GoTemplateError for a word or a variable that is not known, also where nothing would be rendered."""
    declared = set(declared)
    for node in nodes:
        words = node.words
        names = set[str]()
        if ":=" in words:
            where = words.index(":=")
            names, words = {word for word in words[:where] if word.startswith("$")}, words[where + 1 :]
        for word in words:
            if word.startswith("$") and word.split(".")[0] not in declared:
                raise GoTemplateError(f"'{word}' is not declared")
            if word[0].isalpha() and word not in (*FUNCTIONS, "if", "range", "else", "true", "false"):
                raise GoTemplateError(f"'{word}' is not known here")
        if node.words[:1] == ["range"]:
            check(node.body, declared | names)
        else:
            declared |= names if node.words[:1] != ["if"] else set()
            check(node.body, declared)
        check(node.otherwise, declared)


def walk(nodes: list[Node], scopes: list[dict[str, Any]], dot: Any) -> Iterator[str]:
    """The text of nodes. `scopes`: variables, innermost last."""
    for node in nodes:
        if not node.words:
            yield node.text
        elif node.words[0] == "if":
            taken = node.body if value_of(node.words[1:], scopes, dot) else node.otherwise
            yield from walk(taken, [*scopes, {}], dot)
        elif node.words[0] == "range":
            yield from each(node, scopes, dot)
        elif len(node.words) > 2 and node.words[1] in (":=", "="):
            assign(node.words, scopes, dot)
        else:
            yield printed(value_of(node.words, scopes, dot))


def each(node: Node, scopes: list[dict[str, Any]], dot: Any) -> Iterator[str]:
    """The text of a `range`."""
    words = node.words[1:]
    names: list[str] = []
    if ":=" in words:
        where = words.index(":=")
        names, words = [word for word in words[:where] if word != ","], words[where + 1 :]
    items = listed(value_of(words, scopes, dot))
    if not items:
        yield from walk(node.otherwise, [*scopes, {}], dot)
    for number, item in enumerate(items):
        values = {names[0]: number, names[1]: item} if len(names) == 2 else dict.fromkeys(names, item)
        yield from walk(node.body, [*scopes, values], item)


def assign(words: list[str], scopes: list[dict[str, Any]], dot: Any) -> None:
    """`$x := value` in the innermost scope, `$x = value` where it was declared."""
    value = value_of(words[2:], scopes, dot)
    if words[1] == ":=":
        scopes[-1][words[0]] = value
        return
    scope = next((scope for scope in reversed(scopes) if words[0] in scope), None)
    if scope is None:
        raise GoTemplateError(f"{words[0]} is not declared")
    scope[words[0]] = value


def value_of(words: list[str], scopes: list[dict[str, Any]], dot: Any) -> Any:
    """The value of an expression: an operand, or a function with operands."""
    operands, at = [], 0
    while at < len(words):
        if words[at] == "(":
            depth, end = 1, at
            while depth:
                end += 1
                if end >= len(words):
                    raise GoTemplateError("a bracket is not closed")
                depth += {"(": 1, ")": -1}.get(words[end], 0)
            operands.append(value_of(words[at + 1 : end], scopes, dot))
            at = end + 1
            continue
        operands.append(FUNCTIONS[words[at]] if words[at] in FUNCTIONS else operand(words[at], scopes, dot))
        at += 1
    if callable(operands[0]):
        return operands[0](*operands[1:])
    if len(operands) != 1:
        raise GoTemplateError(f"cannot read '{' '.join(words)}'")
    return operands[0]


def operand(word: str, scopes: list[dict[str, Any]], dot: Any) -> Any:
    """A string, a number, a boolean, `.`, a field, or a variable."""
    if word.startswith('"'):
        return re.sub(r"\\(.)", lambda match: ESCAPES[match[1]], word[1:-1])
    if word in ("true", "false"):
        return word == "true"
    if re.fullmatch(r"-?\d+", word):
        return int(word)
    name, *fields = word.split(".")
    value = dot
    if name:
        value = next((scope[name] for scope in reversed(scopes) if name in scope), None)
        if value is None and name not in {key for scope in scopes for key in scope}:
            raise GoTemplateError(f"'{word}' is not known")
    for one in filter(None, fields):
        value = value[one]
    return value
