"""What stays compiled is bounded, and what was forgotten is compiled again."""

import mlx.core as mx

from mlxlora.engine.compiled import by_shape


def test_only_the_shapes_used_last_stay_compiled() -> None:
    traced: list[tuple[int, ...]] = []

    def double(a: mx.array, b: mx.array) -> mx.array:
        traced.append((a.size, b.size))
        return a * 2 + b

    function = by_shape(double, most=2)

    def ask(size: int) -> None:
        a = mx.arange(float(size))
        assert function(a, mx.array([1.0])).tolist() == [2 * x + 1 for x in range(size)]

    for size in (1, 2, 1, 2, 3, 2, 3, 1):
        ask(size)
    assert traced == [(1, 1), (2, 1), (3, 1), (1, 1)]
    function(mx.arange(2.0), mx.arange(2.0))  # the shape of every argument counts
    assert traced[-1] == (2, 2)
