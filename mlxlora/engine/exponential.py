"""exp on a CPU at the price of a few multiplications: MLX's own takes as long as fifty.

e^x = 2^n · e^f with n = round(x · log₂ e) and |f| ≤ ln 2 / 2. 2^n is made from its bits, e^f is a polynomial. Both are
one pass over the array each, in a form that compilers turn into vector instructions: one result (two might overlap, so
they would be computed number by number), no branch around what is dear, and so shallow that MLX does not cut it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from threading import get_ident

import mlx.core as mx

from mlxlora.engine.compiled import SHAPES
from mlxlora.engine.device import on_cpu, settle, settles

Pass = Callable[..., mx.array]
BIAS, MANTISSA = 127, 23  # a float32 stores its exponent as n + BIAS, above so many bits of mantissa
LEAST, MOST = -87.0, 88.5  # below, 2^n is soon 0; above, it is ∞ (its exponent would not fit)
# ln 2 as a number of few bits, whose products with n are exact, and what that lacks
LN2, LN2_REST = 0.693359375, -2.12194440054690583e-4
# e^f to 3e-9, constant first
SERIES = (1.0, 1.0, 0.49999994, 0.1666652, 0.041668393, 0.008368757, 0.0013814522)
# 2^f to 2e-8 for |f| ≤ 1/2, constant first
SERIES_OF_TWO = (1.0, 0.693147203, 0.240226479, 0.0555033247, 0.00961843736, 0.00133988744, 0.000153533619)
TO_WHOLE = 1.5 * 2.0**23  # added to a number and taken away again, it leaves the nearest whole number
LARGE = 1 << 20  # numbers whose passes are worth an evaluation each, so that fewer arrays exist at a time


def exponential(x: mx.array, factor: float = 1.0) -> mx.array:
    """exp(factor · x): on a CPU in float32, to three units of the last place from e^−87 to e^88; 0 and ∞ beyond."""
    if not settles():
        return one_operation(x, factor)
    x = x.astype(mx.float32)
    bits_of, product = _passes(x.shape, factor, get_ident())
    bits = bits_of(x)
    if x.size > LARGE:
        settle(bits)
    return product(x, bits, bits.view(mx.float32))


def power_of_two(x: mx.array) -> mx.array:
    """2^x of float32, for x below 2^31: on a CPU, to three units of the last place from −126 to 127; 0 and ∞ beyond.

    Cheaper than `exponential`: nothing is lost when n is taken from x.
    """
    if not settles():
        return mx.power(mx.array(2.0), x)
    bits_of, product = _passes_of_two(x.shape, get_ident())
    bits = bits_of(x)
    if x.size > LARGE:
        settle(bits)
    return product(x, bits.view(mx.float32))


def one_operation(x: mx.array, factor: float = 1.0) -> mx.array:
    """exp(factor · x) where nothing is compiled, or a gradient is followed, for whose sake MLX keeps every result."""
    if not on_cpu():
        return mx.exp(x * factor)
    return mx.power(mx.array(2.0), x.astype(mx.float32) * (factor * math.log2(math.e)))


@lru_cache(maxsize=SHAPES)
def _passes(shape: tuple[int, ...], factor: float, thread: int) -> tuple[Pass, Pass]:
    """The two for arrays of this shape.

    MLX keeps what it compiled, one more for each shape, as long as the function, and for each thread apart.
    """
    return (
        mx.compile(lambda x: _bits(x * factor)),
        mx.compile(lambda x, bits, two_to_n: _product(x * factor, bits, two_to_n)),
    )


@lru_cache(maxsize=SHAPES)
def _passes_of_two(shape: tuple[int, ...], thread: int) -> tuple[Pass, Pass]:
    return mx.compile(_bits_of_two), mx.compile(_product_of_two)


def _bits_of_two(x: mx.array) -> mx.array:
    """The bits of 2^n."""
    stored = (_whole(x) + BIAS).astype(mx.int32)
    return mx.left_shift(mx.maximum(mx.minimum(stored, 2 * BIAS + 1), 0), MANTISSA)


def _product_of_two(x: mx.array, two_to_n: mx.array) -> mx.array:
    """2^n · 2^f."""
    f = x - _whole(x)
    c, f2 = SERIES_OF_TWO, f * f
    low, high = (c[0] + c[1] * f) + (c[2] + c[3] * f) * f2, (c[4] + c[5] * f) + c[6] * f2
    return (low + high * (f2 * f2)) * two_to_n


def _whole(x: mx.array) -> mx.array:
    return (x + TO_WHOLE) - TO_WHOLE


def _bits(x: mx.array) -> mx.array:
    """The bits of 2^n."""
    limited = (x + MOST) - mx.abs(x - MOST)  # twice the smaller of x and MOST: what is larger would be no integer
    stored = (limited * (0.5 * math.log2(math.e)) + (BIAS + 0.5)).astype(mx.int32)
    return mx.left_shift(mx.maximum(stored, 0), MANTISSA)


def _product(x: mx.array, bits: mx.array, two_to_n: mx.array) -> mx.array:
    """2^n · e^f; `two_to_n` is `bits` read as floats."""
    x = mx.where(x < LEAST, LEAST, x)
    n = bits.astype(mx.float32)  # not yet: stored, and times 2^MANTISSA
    step = 2.0**-MANTISSA
    f = (x - (n * (LN2 * step) - LN2 * BIAS)) - (n * (LN2_REST * step) - LN2_REST * BIAS)
    c, f2 = SERIES, f * f
    low, high = (c[0] + c[1] * f) + (c[2] + c[3] * f) * f2, (c[4] + c[5] * f) + c[6] * f2
    return (low + high * (f2 * f2)) * two_to_n
