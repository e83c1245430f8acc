"""The name maps and the numbers they carry, by properties: every map has its inverse, no folding changes a weight."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlora.errors import UnsupportedError
from mlxlora_convert import peft_experts as stacks
from mlxlora_convert.lowrank import Kind, LowRank, Place, concatenated
from mlxlora_convert.names import FAMILIES, PROJECTIONS, Names, each_expert

LEAVES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj", "attn.c_attn", "mlp.gate"]
few = settings(max_examples=60, deadline=None)


def paths(kind: str) -> st.SearchStrategy[str]:
    """Module paths as an mlx-lm model of this kind has them."""
    inner = [rule.mlx for rule in FAMILIES[kind].renames] or ["model.layers.{i}.{rest}"]
    outer = ["model.layers.{i}.{rest}", "lm_head"]
    return st.builds(
        lambda pattern, i, leaf: pattern.format(i=i, rest=leaf, e=0),
        st.sampled_from([*inner, *(outer if not FAMILIES[kind].renames else [])]),
        st.integers(0, 200),
        st.sampled_from(LEAVES),
    )


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_names_come_back(kind: str) -> None:
    names = Names(FAMILIES[kind])

    @few
    @given(paths(kind))
    def check(path: str) -> None:
        hf = names.to_hf(path)
        assert names.to_mlx(hf)[0] == path
        assert path in names.to_mlx(hf)

    check()


@few
@given(
    st.sampled_from([kind for kind, family in FAMILIES.items() if family.experts and family.experts[0].each]),
    st.integers(0, 99),
    st.integers(0, 255),
    st.sampled_from(PROJECTIONS),
)
def test_experts_come_back(kind: str, layer: int, number: int, projection: str) -> None:
    names = Names(FAMILIES[kind])
    path = f"{FAMILIES[kind].experts[0].mlx.format(i=layer)}.{projection}"
    place = names.expert(path)
    assert place is not None
    assert names.single_expert(each_expert(place, number)) == (path, number)
    held = names.expert_holder(place.holder)
    assert held is not None and f"{held[1]}.{projection}" == path


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Did you mean 'qwen3'"):
        Names.of({"model_type": "qwen33"})


def random(kind: Kind, shape: tuple[int, ...], rank: int, scale: float, seed: int = 0) -> LowRank:
    a, b = Place(kind, shape).factors(rank)
    keys = mx.random.split(mx.random.key(seed))
    return LowRank(kind, mx.random.normal(a, key=keys[0]), mx.random.normal(b, key=keys[1]), scale)


def same(one: mx.array, two: mx.array) -> None:
    np.testing.assert_allclose(np.array(one), np.array(two), rtol=1e-4, atol=1e-4)


KINDS: list[tuple[Kind, tuple[int, ...]]] = [("linear", (6, 5)), ("embedding", (9, 4)), ("experts", (3, 6, 5))]
numbers = st.floats(0.01, 50) | st.just(0.0) | st.floats(-5, -0.01)


@few
@given(st.sampled_from(KINDS), st.integers(1, 4), st.integers(0, 3), numbers, st.floats(0.01, 50))
def test_rank_and_scale_change_no_weight(
    what: tuple[Kind, tuple[int, ...]], rank: int, more: int, scale: float, other: float
) -> None:
    part = random(*what, rank, scale)
    same(part.with_rank(rank + more).delta(), part.delta())
    same(part.with_scale(other).delta(), part.delta())
    same(part.scaled(0.5).delta(), 0.5 * part.delta())
    both = concatenated([part, random(*what, 2, other, seed=1)])
    assert both.rank == rank + 2
    same(both.delta(), part.delta() + random(*what, 2, other, seed=1).delta())


@few
@given(st.integers(1, 4), st.integers(1, 4), numbers, numbers, st.booleans(), st.booleans())
def test_gate_and_up_become_one_and_two_again(
    one: int, two: int, first: float, second: float, interleaved: bool, shared: bool
) -> None:
    gate, up = random("experts", (3, 6, 5), one, first), random("experts", (3, 6, 5), two, second, seed=1)
    if shared:
        up = LowRank("experts", gate.a, random("experts", (3, 6, 5), one, 1.0, seed=2).b, second)
    both = stacks.fused(gate, up, 6, interleaved=interleaved)
    assert both.rank == (one if shared else one + two)
    for back, part in zip(stacks.split(both, interleaved=interleaved), (gate, up), strict=True):
        same(back.delta(), part.delta())
    rows = (both.delta()[:, ::2], both.delta()[:, 1::2]) if interleaved else (both.delta()[:, :6], both.delta()[:, 6:])
    same(rows[0], gate.delta())
    same(rows[1], up.delta())
    lora_a, lora_b = stacks.stacked(both)
    same(stacks.unstacked(lora_a, lora_b, 3, both.scale).delta(), both.delta())
    alone = stacks.fused(None, up, 6, interleaved=interleaved)
    same(stacks.split(alone, interleaved=interleaved)[0].delta(), mx.zeros((3, 6, 5)))


@few
@given(st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any))
def test_single_experts_of_different_ranks(ranks: list[int]) -> None:
    singles = [random("linear", (6, 5), rank, 1.0 + rank, seed=rank) if rank else None for rank in ranks]
    stack = stacks.gathered(singles)
    for number, single in enumerate(singles):
        same(stack.delta()[number], single.delta() if single else mx.zeros((6, 5)))
        same(stacks.single(stack, number).delta(), stack.delta()[number])
