"""Attention in linear memory against the plain formula, for every kind that the models use."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import pytest

from mlxlora.engine import attention, attention_call, pattern
from mlxlora.engine.attention import attend
from mlxlora.engine.attention_call import Call, near
from mlxlora.engine.attention_gradients import gradients
from mlxlora.engine.device import settling, settling_afterwards
from mlxlora.engine.masks import layout_of
from mlxlora.engine.pattern import Pattern
from tests.machines import pretend_accelerator

HEADS, GROUPS, LENGTH = 4, 2, 70
SEGMENTS = mx.array([[0] * 20 + [1] * 30 + [2] * 15 + [-1] * 5, [0] * 40 + [1] * 30])


def plain(
    q: mx.array, k: mx.array, v: mx.array, sinks: Any, window: int | None, softcap: float | None, segments: Any
) -> mx.array:
    k, v = mx.repeat(k, HEADS // GROUPS, 1), mx.repeat(v, HEADS // GROUPS, 1)
    scores = (q * 0.3) @ k.swapaxes(-1, -2)
    if softcap:
        scores = mx.tanh(scores / softcap) * softcap
    row, column = mx.arange(LENGTH)[:, None], mx.arange(LENGTH)[None]
    seen = (row >= column) & (row < column + (window or LENGTH))
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = mx.where(seen, scores, -mx.inf)
    if sinks is None:
        return mx.softmax(scores, axis=-1) @ v
    extra = mx.broadcast_to(sinks[None, :, None, None], (*scores.shape[:-1], 1))
    return mx.softmax(mx.concatenate([extra, scores], axis=-1), axis=-1)[..., 1:] @ v


@pytest.fixture(params=["whole", "cut"])
def cuts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short documents together and all keys of a chunk in one product; or as it is done where they are long."""
    if request.param == "cut":
        monkeypatch.setattr(pattern, "APART", 8)
        monkeypatch.setattr(pattern, "SHORT", 8)


@pytest.mark.usefixtures("machine", "cuts")
@pytest.mark.parametrize(
    ("window", "softcap", "sink", "packed"),
    itertools.product([None, 13], [None, 2.0], [False, True], [False, True]),
)
def test_values_and_gradients(window: int | None, softcap: float | None, sink: bool, packed: bool) -> None:
    keys = mx.random.split(mx.random.key(0), 5)
    q = mx.random.normal((2, HEADS, LENGTH, 8), key=keys[0])
    k = mx.random.normal((2, GROUPS, LENGTH, 8), key=keys[1])
    v = mx.random.normal((2, GROUPS, LENGTH, 6), key=keys[2])
    slope = mx.random.normal((2, HEADS, LENGTH, 6), key=keys[3])
    sinks = [mx.random.normal((HEADS,), key=keys[4])] if sink else []
    segments = SEGMENTS if packed else None
    layouts = [layout_of(segments, linear=True, chunk=0, traced=traced) for traced in (True, False)]

    def wanted(q: mx.array, k: mx.array, v: mx.array, sinks: Any = None) -> mx.array:
        return (plain(q, k, v, sinks, window, softcap, segments) * slope).sum()

    expected = mx.value_and_grad(wanted, argnums=tuple(range(3 + sink)))(q, k, v, *sinks)
    for layout, chunk in itertools.product(layouts, (16, 0, LENGTH)):
        seen = Pattern(window, layout.lookback, layout.firsts, softcap, chunk)

        def ours(q: mx.array, k: mx.array, v: mx.array, *sinks: mx.array, seen: Pattern = seen) -> mx.array:
            sink = sinks[0] if sinks else None
            return (attend(q, k, v, scale=0.3, pattern=seen, sinks=sink, segments=segments)[0] * slope).sum()

        found = mx.value_and_grad(ours, argnums=tuple(range(3 + sink)))(q, k, v, *sinks)
        assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5, abs=1e-4)
        for a, b in zip(found[1], expected[1], strict=True):
            assert float(mx.abs(a - b).max()) < 2e-5


@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
@pytest.mark.parametrize(
    ("window", "softcap", "sink", "packed"),
    [(None, None, False, False), (40, None, True, False), (None, 20.0, True, True), (13, None, False, True)],
)
def test_bare_scores_unless_they_are_too_large(
    monkeypatch: pytest.MonkeyPatch, size: float, window: int | None, softcap: float | None, sink: bool, packed: bool
) -> None:
    """A CPU that computes array after array: exponentials without a maximum taken away, where float32 holds them."""
    for name, value in (("APART", 8), ("SHORT", 8)):
        monkeypatch.setattr(pattern, name, value)
    monkeypatch.setattr(attention_call, "KEYS_AT_A_TIME", 16)
    keys = mx.random.split(mx.random.key(0), 5)
    q = mx.random.normal((2, HEADS, LENGTH, 8), key=keys[0]) * size
    k = mx.random.normal((2, GROUPS, LENGTH, 8), key=keys[1])
    v = mx.random.normal((2, GROUPS, LENGTH, 6), key=keys[2])
    slope = mx.random.normal((2, HEADS, LENGTH, 6), key=keys[3])
    sinks = [mx.random.normal((HEADS,), key=keys[4])] if sink else []
    segments = SEGMENTS if packed else None

    def wanted(q: mx.array, k: mx.array, v: mx.array, sinks: Any = None) -> mx.array:
        return plain(q, k, v, sinks, window, softcap, segments)

    (expected,), by = mx.vjp(wanted, [q, k, v, *sinks], [slope])
    layout = layout_of(segments, linear=True, chunk=0, traced=False)
    seen = Pattern(window, layout.lookback, layout.firsts, softcap, 16)
    held: list[bool] = []
    monkeypatch.setattr(attention._Slab, "_held", _watched(attention._Slab._held, held))
    with settling():
        call = Call((q, k, v, *sinks), segments, 0.3, seen, bare=True)
        out, logs = attention._forward(call)
        back = Call((q, k, v, *sinks), segments, 0.3, seen, bare=near(logs))
        found = gradients(back, slope, out, logs)
    assert any(len(chunk.parts) > 2 for chunk in call.chunks) or packed
    assert call.bare == back.bare == (not held) == (size == 1.0 or softcap is not None)
    assert float(mx.abs(out - expected).max()) < 1e-5 * max(1.0, size / 30)  # float32 has seven digits
    for a, b in zip(found, by, strict=True):
        assert float(mx.abs(a - b).max()) < 5e-5 * size


def test_the_backward_pass_asks_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look at an output of the trace would compute everything before it there and then, and keep it."""
    asked: list[mx.array] = []
    monkeypatch.setattr(attention, "near", lambda logs: not asked.append(logs))
    q = mx.random.normal((1, HEADS, LENGTH, 8), key=mx.random.key(1))
    k = mx.random.normal((1, GROUPS, LENGTH, 8), key=mx.random.key(2))
    with settling():
        result = attend(q, k, k, scale=0.3, pattern=Pattern())[1]
    asked.clear()
    with settling_afterwards():
        mx.grad(lambda q: attend(q, k, k, scale=0.3, pattern=Pattern(), result=result)[0].sum())(q)
    assert len(asked) == 1 and asked[0] is result[1]


def _watched(method: Any, calls: list[bool]) -> Any:
    def watched(*args: Any) -> Any:
        calls.append(True)
        return method(*args)

    return watched


@pytest.mark.usefixtures("machine")
def test_half_precision_stays_near() -> None:
    q = mx.random.normal((1, HEADS, LENGTH, 8), key=mx.random.key(1))
    k = mx.random.normal((1, GROUPS, LENGTH, 8), key=mx.random.key(2))
    exact = attend(q, k, k, scale=0.3, pattern=Pattern())[0]
    half = attend(*(array.astype(mx.bfloat16) for array in (q, k, k)), scale=0.3, pattern=Pattern())[0]
    assert half.dtype == mx.bfloat16
    assert float(mx.abs(half.astype(mx.float32) - exact).max()) < 0.05


@pytest.mark.parametrize(("kernel", "width"), [(True, 64), (True, 256), (False, 64)])
def test_no_scores_of_all_pairs_where_mlx_would_make_them(
    monkeypatch: pytest.MonkeyPatch, kernel: bool, width: int
) -> None:
    """Within a gradient, and for wide heads, MLX's own choice on Metal is not its fused kernel: it is asked for by
    force, or attention goes chunk by chunk."""
    asked = pretend_accelerator(monkeypatch, kernel=kernel)
    seen: list[int] = []
    scores = attention_call.Call.scores

    def watched(self: Any, queries: mx.array, *where: Any) -> Any:
        seen.append(queries.shape[-2] // (HEADS // GROUPS))
        return scores(self, queries, *where)

    monkeypatch.setattr(attention_call.Call, "scores", watched)
    q = mx.random.normal((1, HEADS, LENGTH, width), key=mx.random.key(1))
    k = mx.random.normal((1, GROUPS, LENGTH, width), key=mx.random.key(2))
    found = mx.grad(lambda q: attend(q, k, k, scale=0.3, pattern=Pattern(chunk=16))[0].sum())(q)
    expected = mx.grad(lambda q: plain(q, k, k, None, None, None, None).sum())(q)
    assert float(mx.abs(found - expected).max()) < 1e-5 * float(mx.abs(expected).max())
    assert asked == (["causal"] if kernel and width == 64 else [])
    assert seen == [14] * (5 if asked else 10)  # queries of a chunk; there again, unless fused, and back


def test_chunks_keep_to_documents_and_skip_what_nobody_sees() -> None:
    numbers = [0] * 150 + [1] * 240 + [2] * 20 + [3] * 30 + [4] * 410
    layout = layout_of(mx.array([numbers]), linear=True, chunk=0, traced=False)
    cut = pattern.Cut(Pattern(firsts=layout.firsts), mx.array([numbers]), 1, len(numbers), 1 << 20, 4096)
    found = [(chunk.first, chunk.start, chunk.end) for chunk in cut.chunks()]
    assert [end for _, _, end in found] == [start for _, start, _ in found[1:]] + [len(numbers)]
    whole = [(390, 390, 440)]  # two short documents together
    assert [chunk for chunk in found if 390 <= chunk[1] < 440] == whole
    for first, start, end in found:
        assert len(set(numbers[start:end])) == 1 or (first, start, end) in whole
        assert first == numbers.index(numbers[start])
    wanted = sum(numbers.count(n) * (numbers.count(n) + 1) / 2 for n in range(5))
    assert sum(chunk.pairs for chunk in cut.chunks()) < 1.3 * wanted


def test_keys_that_all_queries_see_need_no_mask() -> None:
    cut = pattern.Cut(Pattern(window=2000, chunk=256), None, 1, 4096, 1 << 20, 4096)
    last = cut.chunks()[-1]
    parts = [(part.first, part.end, part.masked) for part in last.parts]
    assert (last.first, last.start, last.end) == (4096 - 256 - 1999, 3840, 4096)
    assert parts == [(1841, 2096, True), (2096, 3840, False), (3840, 4096, True)]
    free = cut.penalty(last, pattern.Part(2096, 3840, True))
    assert float(free.min()) == 0  # which is why they need none
    assert float(cut.penalty(last, pattern.Part(2095, 3840, True)).min()) < 0
