"""Where chat templates run: Jinja's immutable sandbox, with bounds on time and on size.

Jinja keeps a template away from Python; it does not keep it from taking all of the machine's time or memory. Here every
loop, macro and comparison begins with a look at the clock, put there when the template is parsed, and every step that
may make something large goes through a function that measures it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.nodes as nodes
import jinja2.sandbox
from jinja2.ext import Extension, loopcontrols

from mlxlora.data.bounds import CHARACTERS, Bounds, size_of

SECONDS = 5.0  # of the processor: one rendering


class _Generation(Extension):
    """`{% generation %}` marks what the model says; here it marks nothing and renders what it holds."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that Jinja asks for

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of one template."""

    intercepted_binops = frozenset({"*", "**", "%"})  # `+` and `~` are replaced when the template is parsed

    def __init__(self, date: datetime.date) -> None:
        """date: what `strftime_now` formats."""
        bounds = self.bounds = Bounds()
        # unoptimised: the optimiser would compute constant expressions when the template is compiled
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, loopcontrols],
            finalize=bounds.printable,
        )
        self.concat = bounds.bounded  # type: ignore[method-assign]
        self.filters = {name: self._guarded(name, self.filters[name]) for name in FILTERS}
        self.filters["tojson"] = self._guarded("tojson", bounds.tojson)
        self.filters |= {"_tick": bounds.tick, "_seen": bounds.seen, "_made": bounds.made}
        self.filters |= {"_joined": bounds.joined, "_added": bounds.added}
        self.tests = {name: self._looking(test) for name, test in self.tests.items()}
        moment = datetime.datetime(date.year, date.month, date.day, 12)
        self.globals = {
            "range": self.globals["range"],
            "namespace": _Namespace,
            "dict": dict,
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: bounds.strftime(moment, pattern),
        }

    def compiled(self, source: str) -> jinja2.Template:
        """The template of a source. What is constant in it is computed now, within the same bounds."""
        self.bounds.begin(SECONDS)
        return self.from_string(source)

    def rendered(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """What a template of this sandbox writes. Raises what Jinja raises, TooSlow, and what its operations do."""
        self.bounds.begin(SECONDS)
        return self.bounds.bounded(template.generate(values))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
            node.body.insert(0, nodes.ExprStmt(self._look(), lineno=node.lineno))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.Or(self._look(), node.test, lineno=node.lineno)
        self._replace(tree)
        return tree

    def _look(self) -> nodes.Expr:
        """An expression that looks at the clock, and is false."""
        return self._function("_tick", nodes.Const(None), [])

    def _function(self, name: str, first: nodes.Expr, rest: list[nodes.Expr]) -> nodes.Filter:
        """A call of one of our own functions: as a filter, which Jinja compiles to a plain call."""
        node = nodes.Filter(first, name, rest, [], None, None)
        node.set_lineno(first.lineno or 1)
        node.set_environment(self)
        return node

    def _replace(self, node: nodes.Node) -> None:
        """Lead every step below `node` that may make something large through a function that measures it."""
        for field, value in node.iter_fields():
            if isinstance(value, nodes.Node):
                setattr(node, field, self._measured(value))
                self._replace(value if isinstance(value, _LITERALS) else getattr(node, field))
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if isinstance(item, nodes.Node):
                        value[index] = self._measured(item)
                        self._replace(item if isinstance(item, _LITERALS) else value[index])

    def _measured(self, node: nodes.Node) -> nodes.Node:
        if isinstance(node, nodes.Concat):
            return self._function("_joined", node.nodes[0], list(node.nodes[1:]))
        if isinstance(node, nodes.Compare):
            node.expr = self._function("_seen", node.expr, [])
        elif isinstance(node, nodes.Pair) and not isinstance(node.key, nodes.Const):
            node.key = self._function("_seen", node.key, [])
        elif isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Const | nodes.Slice):
            node.arg = self._function("_seen", node.arg, [])
        elif _makes_something(node):
            assert isinstance(node, nodes.Expr)
            return self._function("_made", node, [])
        terms: list[nodes.Expr] = []
        first: nodes.Node = node
        while isinstance(first, nodes.Add):
            terms.insert(0, first.right)
            first = first.left
        return self._function("_added", first, terms) if terms and isinstance(first, nodes.Expr) else node

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.bounds.tick()
        if operator == "*":
            self.bounds.check_product(left, right)
        elif operator == "**":
            self.bounds.check_number(left)
            if not isinstance(right, int | float) or abs(right) > 64:
                raise jinja2.TemplateRuntimeError("the template raises a number to a large power")
        elif isinstance(left, str):
            self.bounds.check_format(left, "%", (right,))
        return self.bounds.made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.bounds.tick()
        for value in (*args, *kwargs.values()):
            self.bounds.check_number(value)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            args = self.bounds.check_method(owner, function.__name__, args)
        return self.bounds.made(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        text = getattr(value, "__self__", None)
        wrapped = super().wrap_str_format(value)
        if wrapped is None or not isinstance(text, str):
            return wrapped

        def run(*args: Any, **kwargs: Any) -> Any:
            self.bounds.check_format(text, "{", (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return run

    def _looking(self, test: Any) -> Any:
        """A test that looks at the clock first."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.bounds.tick()
            return test(*args, **kwargs)

        run.__dict__.update(getattr(test, "__dict__", {}))  # how Jinja knows that a test wants the environment
        return run

    def _guarded(self, name: str, function: Callable[..., Any]) -> Any:
        """A filter that looks at its arguments first, and at what it made."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.bounds.tick()
            passed = [value for value in args if isinstance(value, _PASSED)]
            given = [value for value in args if not isinstance(value, _PASSED)]
            for value in (*given, *kwargs.values()):
                self.bounds.check_number(value)
            self._check_filter(name, given, kwargs)
            return self.bounds.made(function(*passed, *given, **kwargs))

        run.__dict__.update(getattr(function, "__dict__", {}))  # how Jinja knows that a filter wants the context
        return run

    def _check_filter(self, name: str, given: list[Any], kwargs: dict[str, Any]) -> None:
        """Refuse what a filter would make too large. `given` may be changed to what has been measured."""
        words = [*given[1:], *kwargs.values()]
        if name == "join":
            given[0] = parts = self.bounds.made(list(given[0]))
            self.bounds.check_size(
                size_of(parts, CHARACTERS + 1) + len(parts) * max((len(str(w)) for w in words), default=0)
            )
        elif name == "replace" and len(words) >= 2:
            self.bounds.check_method(str(given[0]), "replace", tuple(words))
        elif name == "trim" and words:
            self.bounds.check_method(str(given[0]), "strip", tuple(words))
        elif name == "indent":
            width = max((w if type(w) is int else len(str(w)) for w in words), default=4)
            self.bounds.check_size((str(given[0]).count("\n") + 1) * (width + 1))
        elif name == "format":
            self.bounds.check_format(str(given[0]), "%", words)
        elif name == "sum" and not all(isinstance(w, str | int | float | None) for w in words):
            raise jinja2.TemplateRuntimeError("sum adds numbers")


_LITERALS = (nodes.List, nodes.Tuple, nodes.Dict, nodes.Getitem)
_PASSED = (jinja2.Environment, jinja2.runtime.Context, nodes.EvalContext)  # what Jinja itself passes to filters


def _makes_something(node: nodes.Node) -> bool:
    """Whether an expression makes a value of others: a literal that is no store to be unpacked into, or a slice."""
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Slice)
    if isinstance(node, nodes.List | nodes.Tuple):
        store = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return not store and not all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Dict)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, made by keywords alone: a name with an underscore could reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        if any(name.startswith("_") for name in kwargs):
            raise jinja2.exceptions.SecurityError("a namespace cannot hold a name that begins with an underscore")
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __repr__(self) -> str:  # Jinja's writes out all that it holds
        return "<Namespace>"


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


FILTERS = (
    "abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min",
    "random", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort",
    "string", "striptags", "sum", "title", "trim", "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
