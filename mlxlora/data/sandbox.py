"""Where chat templates run: Jinja's immutable sandbox, with bounds on time, output and intermediate strings.

Jinja keeps a template away from Python; it does not keep it from taking all of the machine's time or memory.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.nodes
import jinja2.sandbox
from jinja2.ext import Extension, loopcontrols

SECONDS = 5.0  # one rendering
CHARACTERS = 64 * 1024 * 1024  # its output, and any string on the way
LARGEST_NUMBER = 100_000  # as an argument: widths, counts, repeats


class _Generation(Extension):
    """`{% generation %}` marks what the model says; here it marks nothing and renders what it holds."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that Jinja asks for

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of one template.

    Every loop and macro body begins with a look at the clock, put there when the template is parsed. Strings grow only
    through functions that look at the size first.
    """

    intercepted_binops = frozenset({"*", "**", "%"})  # `+` and `~` are replaced when the template is parsed

    def __init__(self, date: datetime.date) -> None:
        """date: what `strftime_now` formats."""
        # unoptimised: the optimiser would compute constant expressions at compile time, outside of any bound
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, loopcontrols],
            finalize=self.printable,
        )
        self.deadline = float("inf")
        self.concat = self.bounded  # type: ignore[method-assign]
        self.filters = {name: self._guarded(name, self.filters[name]) for name in FILTERS}
        self.filters["tojson"] = self._guarded("tojson", _tojson)
        self.filters |= {"_tick": self.tick, "_joined": self.joined, "_added": self.added}
        moment = datetime.datetime(date.year, date.month, date.day, 12)
        self.globals = {
            "range": self.globals["range"],
            "namespace": _Namespace,
            "dict": dict,
            "raise_exception": _raise_exception,
            "strftime_now": moment.strftime,
        }

    def rendered(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """What a template of this sandbox writes. Raises what Jinja raises, and what the template's operations do."""
        self.deadline = time.monotonic() + SECONDS
        return self.bounded(template.generate(values))

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        kinds = (jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)
        for node in tree.find_all(kinds):
            if isinstance(node, kinds):
                look = self._function("_tick", jinja2.nodes.Const(None), [])
                node.body.insert(0, jinja2.nodes.ExprStmt(look, lineno=node.lineno))
        _replace_sums(tree, self)
        return tree

    def _function(self, name: str, first: jinja2.nodes.Expr, rest: list[jinja2.nodes.Expr]) -> jinja2.nodes.Filter:
        """A call of one of our own functions: as a filter, which Jinja compiles to a plain call."""
        node = jinja2.nodes.Filter(first, name, rest, [], None, None)
        node.set_lineno(first.lineno or 1)
        node.set_environment(self)
        return node

    def tick(self, _: Any = None) -> str:
        """Stop a rendering that takes too long."""
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateRuntimeError(f"the template took longer than {SECONDS:g} seconds")
        return ""

    def joined(self, *parts: Any) -> str:
        """`a ~ b`, bounded."""
        return self.bounded(str(self.printable(part)) for part in parts)

    def added(self, first: Any, *rest: Any) -> Any:
        """`a + b + c`, bounded."""
        if isinstance(first, str):
            parts = (first, *rest)
            if all(isinstance(part, str) for part in parts):
                if sum(map(len, parts)) > CHARACTERS:
                    self.check_size(CHARACTERS + 1)
                return "".join(parts)
        for part in rest:
            if isinstance(first, (str, list, tuple)) and isinstance(part, (str, list, tuple)):
                self.check_size(len(first) + len(part))
            first = first + part
        return first

    def printable(self, value: Any) -> Any:
        """`value` as it is, once it is known that writing it out stays below the limit."""
        if value.__class__ is str:
            return value
        if not isinstance(value, (str, int, float, bool, type(None))):
            self.check_size(_written_size(value, CHARACTERS + 1))
        return value

    def bounded(self, parts: Iterable[str]) -> str:
        """Join strings, as long as they stay below the limit."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            self.check_size(size)
            kept.append(part)
        return "".join(kept)

    def check_size(self, size: int) -> None:
        """Refuse a string or list of this size."""
        if size > CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"the template writes more than {CHARACTERS:,} characters")
        self.tick()

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(other, int):
                    self.check_arguments((other,), {})
                    self.check_size(len(one) * max(other, 0))
        elif operator == "**":
            self.check_arguments((left, right), {})
            if abs(right) > 64:
                raise jinja2.TemplateRuntimeError("the template raises a number to a large power")
        elif operator == "%" and isinstance(left, str) and _wide(left):
            raise jinja2.TemplateRuntimeError("the template formats text to a large width")
        if operator == "%":
            self.printable(right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_arguments(args, kwargs)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            self.check_method(owner, function.__name__, args)
        return super().call(context, function, *args, **kwargs)

    def check_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse numbers that could only be meant to exhaust the machine."""
        self.tick()
        for value in (*args, *kwargs.values()):
            self.printable(value)
            if isinstance(value, (int, float)) and abs(value) > LARGEST_NUMBER:
                raise jinja2.TemplateRuntimeError(f"the template passes the number {value}")

    def check_method(self, text: str, name: str, args: Sequence[Any]) -> None:
        """Refuse methods of strings whose result would be too large."""
        if name == "replace" and len(args) >= 2:
            old, new = str(args[0]), str(args[1])
            self.check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        elif name == "join" and args and isinstance(args[0], (list, tuple)):
            self.check_size(sum(len(str(part)) + len(text) for part in args[0]))

    def wrap_str_format(self, value: Any) -> Any:
        text = getattr(value, "__self__", None)
        if isinstance(text, str) and value.__name__ in ("format", "format_map") and _wide(text):
            raise jinja2.TemplateRuntimeError("the template formats text to a large width")
        return super().wrap_str_format(value)

    def _guarded(self, name: str, function: Any) -> Any:
        """A filter that looks at its arguments first."""

        def run(*args: Any, **kwargs: Any) -> Any:
            given = [value for value in args if not isinstance(value, _PASSED)]
            self.check_arguments(given, kwargs)
            if name == "replace" and len(given) >= 3:
                self.check_method(str(given[0]), "replace", given[1:])
            elif name == "join" and isinstance(given[0], (list, tuple)):
                self.check_method(str([*given, kwargs.get("d", "")][1]), "join", given)
            elif name == "indent":
                width = [*given, kwargs.get("width", 4)][1]
                self.check_size(str(given[0]).count("\n") * (width if isinstance(width, int) else len(str(width))))
            elif name == "format" and _wide(str(given[0])):
                raise jinja2.TemplateRuntimeError("the template formats text to a large width")
            return function(*args, **kwargs)

        run.__dict__.update(getattr(function, "__dict__", {}))  # how Jinja knows that a filter wants the context
        return run


_PASSED = (jinja2.Environment, jinja2.runtime.Context, jinja2.nodes.EvalContext)  # what Jinja itself passes to filters


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, made by keywords alone: a name with an underscore could reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        if any(name.startswith("_") for name in kwargs):
            raise jinja2.exceptions.SecurityError("a namespace cannot hold a name that begins with an underscore")
        jinja2.utils.Namespace.__init__(*args, **kwargs)


def _replace_sums(node: jinja2.nodes.Node, environment: Sandbox) -> None:
    """Turn every `a + b + c` and `a ~ b` below `node` into one call of a bounded function."""
    for field, value in node.iter_fields():
        if isinstance(value, jinja2.nodes.Node):
            setattr(node, field, _bounded_sum(value, environment))
            _replace_sums(getattr(node, field), environment)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, jinja2.nodes.Node):
                    value[index] = _bounded_sum(item, environment)
                    _replace_sums(value[index], environment)


def _bounded_sum(node: jinja2.nodes.Node, environment: Sandbox) -> jinja2.nodes.Node:
    if isinstance(node, jinja2.nodes.Concat):
        return environment._function("_joined", node.nodes[0], list(node.nodes[1:]))
    terms: list[jinja2.nodes.Expr] = []
    first: jinja2.nodes.Node = node
    while isinstance(first, jinja2.nodes.Add):
        terms.insert(0, first.right)
        first = first.left
    if not terms or not isinstance(first, jinja2.nodes.Expr):
        return node
    return environment._function("_added", first, terms)


def _written_size(value: Any, limit: int) -> int:
    """At least how many characters `value` takes when written out, counted no further than `limit`."""
    if isinstance(value, str):
        return len(value)
    size = 2
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, (list, tuple)):
        for part in value:
            size += 2 + _written_size(part, limit - size)
            if size > limit:
                break
    return size


def _wide(pattern: str) -> bool:
    """Whether a format string asks for a width of four digits or more, or takes it from an argument."""
    return re.search(r"%[^a-zA-Z%]*(\d{4,}|\*)|\{[^}]*(\d{4,}|\{)", pattern) is not None


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if indent is not None and (not isinstance(indent, (int, str)) or len(str(indent)) > 3):
        raise jinja2.TemplateRuntimeError("tojson: the indent is too large")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


FILTERS = (
    "abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min",
    "random", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort",
    "string", "striptags", "sum", "title", "trim", "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
