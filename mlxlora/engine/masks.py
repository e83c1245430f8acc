"""Handing our masks and our attention to models that know neither.

mlx-lm's models ask one function for their masks, `create_attention_mask`, and give what they get to another,
`scaled_dot_product_attention`. While a step is traced, the modules of one network see our versions of both: the first
returns a `CausalMask`, which says what is meant instead of being T × T booleans; the second recognises it and calls
`attend`. A mask that the model made itself, or a call with a cache, goes to mlx-lm's own function. Packed rows need
no more than that: what may not see each other is in the layout of the batch, which the mask function knows and no
model has to.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora import mlxlm
from mlxlora.engine.activations import swiglu
from mlxlora.engine.attention import attend
from mlxlora.engine.device import on_cpu, settles
from mlxlora.engine.hold import own_class, reads_global, rebound
from mlxlora.engine.pattern import CausalMask, Pattern
from mlxlora.engine.rotations import KEPT, Tables, tables
from mlxlora.engine.structure import PRIVATE
from mlxlora.engine.tape import current

GEMMA2 = "mlx_lm.models.gemma2"
FREQUENCIES = 1024  # numbers of an array that are looked at one by one
MASK, ATTENTION = "create_attention_mask", "scaled_dot_product_attention"


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of the batch in work are to attend.

    linear:   in linear memory, where the model's attention allows it
    segments: int [B, T], the document that a token belongs to, or None
    lookback, firsts, chunk: see `Pattern`
    tables:   of rotary positions, for the batch in work
    """

    linear: bool
    segments: mx.array | None = None
    lookback: int | None = None
    firsts: Sequence[int] | None = None
    chunk: int = 0
    tables: dict[Any, tuple[Any, Tables | None]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def kept(self) -> int:
        """Bytes of the tables so far, which live as long as the batch is in work."""
        return sum(found.nbytes for _, found in self.tables.values() if found is not None)

    @property
    def kind(self) -> Layout:
        """Without what differs from batch to batch: equal for two batches that one trace serves, and kept as long."""
        return replace(self, segments=None, firsts=None, tables={})


@dataclass(slots=True)
class Census:
    """How many calls of attention there were, and how many of them in linear memory."""

    all: int = 0
    linear: int = 0


_unseeing: ContextVar[bool] = ContextVar("unseeing", default=False)
_census: ContextVar[Census | None] = ContextVar("census", default=None)
_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


def create_attention_mask(
    h: mx.array, cache: Any = None, window_size: int | None = None, return_array: bool = False
) -> Any:
    """Ours in place of mlx-lm's function of this name, for a network in hand (see `steering`)."""
    layout = _layout.get()
    length = h.shape[1]
    if layout is None or cache is not None:
        return mlxlm.module("models.base").create_attention_mask(h, cache, window_size, return_array)
    if layout.linear and not return_array:
        return CausalMask(window_size)
    if layout.segments is None:
        return mlxlm.module("models.base").create_attention_mask(h, None, window_size, return_array)
    query, key = mx.arange(length)[:, None], mx.arange(length)[None]
    seen = query >= key if window_size is None else (query >= key) & (query < key + window_size)
    return seen & (layout.segments[:, None, :, None] == layout.segments[:, None, None, :])


def scaled_dot_product_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any = None,
    scale: float = 1.0,
    mask: Any = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Ours in place of mlx-lm's function of this name, for a network in hand (see `steering`)."""
    if _unseeing.get():
        return _nothing(queries, values)
    if not isinstance(mask, CausalMask):
        _count(linear=False)
        function = mlxlm.module("models.base").scaled_dot_product_attention
        out: mx.array = function(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
        return out
    return _attend(queries, keys, values, scale, mask, sinks=sinks)


def _attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: CausalMask,
    *,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    if _unseeing.get():
        return _nothing(queries, values)
    _count(linear=True)
    layout = _layout.get()
    if layout is None or queries.shape[2] != keys.shape[2]:
        raise ValueError("a mask of the engine was kept beyond its step")
    tape = current()
    known = tape.read(ATTENTION, 2) if tape is not None and tape.reading else [None, None]
    out, result = attend(
        queries,
        keys,
        values,
        scale=scale,
        pattern=Pattern(mask.window, layout.lookback, layout.firsts, softcap, layout.chunk),
        sinks=sinks,
        segments=layout.segments,
        result=None if known[0] is None or known[1] is None else (known[0], known[1]),
    )
    if tape is not None and not tape.reading:
        tape.write(ATTENTION, *result)
    return out


def _count(*, linear: bool) -> None:
    census = _census.get()
    if census is not None:
        census.all += 1
        census.linear += linear


def softcap_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, softcap: float, mask: Any
) -> mx.array:
    """Ours in place of gear's `_softcap_attention`."""
    if isinstance(mask, CausalMask):
        return _attend(queries, keys, values, scale, mask, softcap=softcap)
    _count(linear=False)
    out: mx.array = mlxlm.module("models.gear")._softcap_attention(queries, keys, values, scale, softcap, mask)
    return out


def gemma2_attention(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """Ours in place of the `__call__` of gemma2's attention, which caps its scores by itself."""
    if not isinstance(mask, CausalMask):
        _count(linear=False)
        out: mx.array = mlxlm.module("models.gemma2").Attention.__call__(self, x, mask, cache)
        return out
    rows, length, _ = x.shape

    def heads(array: mx.array, count: int) -> mx.array:
        return array.reshape(rows, length, count, -1).transpose(0, 2, 1, 3)

    queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    queries, keys = self.rope(heads(queries, self.n_heads)), self.rope(heads(keys, self.n_kv_heads))
    found = _attend(
        queries, keys, heads(values, self.n_kv_heads), self.scale, mask, softcap=self.attn_logit_softcapping
    )
    out = self.o_proj(found.transpose(0, 2, 1, 3).reshape(rows, length, -1))
    return out


def capped_mask(h: mx.array, cache: Any = None, window_size: int | None = None, return_array: bool = False) -> Any:
    """`create_attention_mask` for gemma2, which asks for an array that `gemma2_attention` does not need."""
    layout = _layout.get()
    linear = layout is not None and layout.linear and cache is None
    return create_attention_mask(h, cache, window_size, return_array and not linear)


def _ours() -> dict[str, tuple[Any, Callable[..., Any]]]:
    """Name among a module's globals → (mlx-lm's own object of that name, ours)."""
    base = mlxlm.module("models.base")
    found: dict[str, tuple[Any, Callable[..., Any]]] = {
        MASK: (base.create_attention_mask, create_attention_mask),
        ATTENTION: (base.scaled_dot_product_attention, scaled_dot_product_attention),
    }
    if "mlx_lm.models.gear" in sys.modules:
        found["_softcap_attention"] = (mlxlm.module("models.gear")._softcap_attention, softcap_attention)
    if on_cpu():
        found["swiglu"] = (mlxlm.module("models.activations").swiglu, swiglu)
    return found


def _with_ours(function: Any, depth: int = 2) -> types.FunctionType | None:
    """A copy of `function` that sees our functions, also through helpers of its module; None if it uses neither."""
    if not isinstance(function, types.FunctionType) or "__wrapped__" in function.__dict__:
        return None
    names: dict[str, Any] = {
        name: ours
        for name, (theirs, ours) in _ours().items()
        if reads_global(function, name) and function.__globals__.get(name) is theirs
    }
    if MASK in names and function.__module__ == GEMMA2:
        names[MASK] = capped_mask
    for name in function.__code__.co_names if depth else ():
        helper = function.__globals__.get(name)
        if isinstance(helper, types.FunctionType) and helper.__module__ == function.__module__:
            copy = _with_ours(helper, depth - 1)
            if copy is not None:
                names[name] = copy
    return rebound(function, names) if names else None


@cache
def _steered_class(original: type[nn.Module]) -> type[nn.Module] | None:
    """A subclass of `original` whose methods see our functions; None if none of them uses any."""
    if "rope" in original.__name__.lower():
        return _restarting_class(original)
    methods: dict[str, Any] = {}
    for cls in reversed(original.__mro__):
        if cls.__module__.startswith("mlx."):
            continue
        for name, function in vars(cls).items():
            copy: Any = _with_ours(function)
            if (cls.__module__, cls.__name__, name) == (GEMMA2, "Attention", "__call__"):
                copy = gemma2_attention
            if copy is not None:
                methods[name] = copy
            elif name in methods:
                del methods[name]
    if not methods:
        return None
    return type(original.__name__, (original,), {**methods, "__module__": original.__module__})


def _restarting_class(original: Any) -> type[nn.Module]:
    """A subclass of rotary positions that counts from 0 in each document of a row.

    Attention sees distances alone, so this changes rounding and nothing else: an angle is the more exact the smaller
    it is.
    """

    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        layout = _layout.get()
        if layout is None or args or kwargs:
            whole: mx.array = original.__call__(self, x, *args, **kwargs)
            return whole
        firsts = layout.firsts if x.shape[0] == 1 and layout.firsts and len(layout.firsts) == x.shape[-2] else ()
        starts = [at for at, first in enumerate(firsts) if at == first and at]

        def turn(x: mx.array) -> mx.array:
            parts = [original.__call__(self, part) for part in mx.split(x, starts, axis=-2)] if starts else []
            out: mx.array = mx.concatenate(parts, axis=-2) if parts else original.__call__(self, x)
            return out

        tables = _tables(self, turn, layout, x.shape) if settles() else None
        return turn(x) if tables is None else tables.turn(x)

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


def _tables(
    module: nn.Module, turn: Callable[[mx.array], mx.array], layout: Layout, shape: Sequence[int]
) -> Tables | None:
    """The tables of a module of rotary positions for this batch; None where it has none."""
    dims = getattr(module, "dims", getattr(module, "dim", None))
    if not isinstance(dims, int) or dims % 2 or len(shape) != 4:
        return None
    state = {key: value for key, value in {**vars(module), **module}.items() if key not in PRIVATE}
    name = (own_class(module), *((key, _same(value)) for key, value in state.items()), *shape[-2:], shape[0] == 1)
    if name not in layout.tables:
        while len(layout.tables) >= KEPT:
            layout.tables.pop(next(iter(layout.tables)))
        layout.tables[name] = (state, tables(turn, shape[-2], shape[-1], dims // 2))  # what has an id must live
    return layout.tables[name][1]


def _same(value: Any) -> Any:
    """Equal for two settings that turn alike: many models hold the same frequencies once for each layer."""
    if isinstance(value, mx.array) and value.size <= FREQUENCIES:
        return value.shape, str(value.tolist())
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


class Steering:
    """The modules of one network that ask for masks, attend, or turn positions into angles."""

    def __init__(self, network: nn.Module) -> None:
        modules = [module for _, module in network.named_modules()]
        self._modules = [module for module in modules if _steered_class(own_class(module)) is not None]
        self.asks = any(
            reads_global(function, MASK) for module in self._modules for function in _functions(own_class(module))
        )

    @contextmanager
    def with_layout(self, layout: Layout) -> Iterator[None]:
        """Our masks and attention for this network, for as long as the block runs."""
        before = [(module, type(module)) for module in self._modules]
        token = _layout.set(layout)
        try:
            for module, cls in before:
                steered: Any = _steered_class(cls)  # type: ignore[arg-type]
                object.__setattr__(module, "__class__", steered)
            yield
        finally:
            for module, cls in before:
                object.__setattr__(module, "__class__", cls)
            _layout.reset(token)


@contextmanager
def counting() -> Iterator[Census]:
    """Count the calls of attention while the block runs."""
    census = Census()
    token = _census.set(census)
    try:
        yield census
    finally:
        _census.reset(token)


@contextmanager
def unseeing() -> Iterator[None]:
    """Let attention of the usual kind give zeros while the block runs: what tokens know of each other then comes by
    another way."""
    token = _unseeing.set(True)
    try:
        yield
    finally:
        _unseeing.reset(token)


def _nothing(queries: mx.array, values: mx.array) -> mx.array:
    return mx.zeros((*queries.shape[:-1], values.shape[-1]), queries.dtype)


def _functions(cls: type) -> list[Any]:
    return [function for base in cls.__mro__ for function in vars(base).values()]


def layout_of(segments: mx.array | None, *, linear: bool, chunk: int, traced: bool) -> Layout:
    """The layout of a batch. Looks at the segments, which the data loader has made; nothing in flight is waited for.

    `traced`: the layout is to serve other batches too, so it says no more than what they have in common.
    """
    if segments is None:
        return Layout(linear, chunk=chunk)
    import numpy as np

    numbers = np.array(segments)
    starts = np.ones_like(numbers, dtype=bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    place = np.arange(numbers.shape[1])
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    if not traced:
        return Layout(linear, segments, firsts=first.min(axis=0).tolist(), chunk=chunk)
    back = int((place - first).max(initial=0))
    # rounded up, so that few traces serve all batches
    step = max(64, 1 << max(0, (back - 1).bit_length() - 2)) if back > 1 else 64
    return Layout(linear, segments, -(-back // step) * step, chunk=chunk)
