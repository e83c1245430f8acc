"""Experts in PEFT: stacked parameters (`target_parameters`) or one module for each expert, from and to MLX's stacks.

E experts, r rank, in and out widths of a layer. PEFT's `target_parameters` keeps lora_A [r·E, in], counted expert by
expert, and lora_B [out, r·E], counted rank by rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxlora_convert.lowrank import LowRank, concatenated


def stacked(part: LowRank) -> tuple[mx.array, mx.array]:
    """lora_A and lora_B of one stacked parameter."""
    experts, rank, in_ = part.a.shape
    out = part.b.shape[1]
    return part.a.reshape(experts * rank, in_), part.b.transpose(1, 2, 0).reshape(out, rank * experts)


def unstacked(lora_a: mx.array, lora_b: mx.array, experts: int, scale: float) -> LowRank:
    """The inverse of `stacked`."""
    in_, out = lora_a.shape[1], lora_b.shape[0]
    return LowRank(
        "experts",
        lora_a.reshape(experts, -1, in_),
        lora_b.reshape(out, -1, experts).transpose(2, 0, 1),
        scale,
    )


def turned(part: LowRank) -> LowRank:
    """The same update with the two sides exchanged.

    PEFT before 0.18 took the two last dimensions of a stacked parameter in the other order.
    """
    return LowRank("experts", part.b.transpose(0, 2, 1), part.a.transpose(0, 2, 1), part.scale)


def fused(gate: LowRank | None, up: LowRank | None, width: int, *, interleaved: bool) -> LowRank:
    """Gate and up as one update of gate_up_proj [E, 2·width, in]; a missing one adds nothing.

    Where both use the same A the rank stays, otherwise the ranks add up.
    """
    present = gate or up
    assert present is not None
    if gate is not None and up is not None and gate.a.shape == up.a.shape and bool(mx.array_equal(gate.a, up.a)):
        common = gate.scale or 1.0
        rows = _rows(gate.with_scale(common).b, up.with_scale(common).b, interleaved)
        return LowRank("experts", gate.a, rows, common)
    parts = []
    for number, part in enumerate((gate, up)):
        if part is not None:
            nothing = mx.zeros((part.b.shape[0], width, part.rank), part.b.dtype)
            both = (part.b, nothing) if number == 0 else (nothing, part.b)
            parts.append(LowRank("experts", part.a, _rows(*both, interleaved), part.scale))
    return concatenated(parts)


def split(both: LowRank, *, interleaved: bool) -> tuple[LowRank, LowRank]:
    """Gate and up of one update of gate_up_proj: the same A, half of the rows of B each."""
    half = both.b.shape[1] // 2
    rows = (both.b[:, ::2], both.b[:, 1::2]) if interleaved else (both.b[:, :half], both.b[:, half:])
    gate, up = (LowRank("experts", both.a, mx.contiguous(part), both.scale) for part in rows)
    return gate, up


def _rows(gate: mx.array, up: mx.array, interleaved: bool) -> mx.array:
    if not interleaved:
        return mx.concatenate([gate, up], axis=1)
    experts, rows, rank = gate.shape
    return mx.stack([gate, up], axis=2).reshape(experts, 2 * rows, rank)


def gathered(singles: Sequence[LowRank | None]) -> LowRank:
    """The updates of single experts (linear, in the experts' order; None adds nothing) as one stack."""
    given = [single for single in singles if single is not None]
    rank, scale = max(single.rank for single in given), given[0].scale or 1.0
    in_, out = given[0].a.shape[0], given[0].b.shape[1]
    nothing = LowRank("linear", mx.zeros((in_, rank)), mx.zeros((rank, out)), scale)
    whole = [(single or nothing).with_scale(scale).with_rank(rank) for single in singles]
    return LowRank(
        "experts", mx.stack([single.a.T for single in whole]), mx.stack([single.b.T for single in whole]), scale
    )


def single(part: LowRank, number: int) -> LowRank:
    """The update of one expert of a stack, as of a linear layer."""
    return LowRank("linear", part.a[number].T, part.b[number].T, part.scale)
