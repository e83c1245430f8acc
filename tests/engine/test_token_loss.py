"""Log-probabilities in chunks against full logits: values, gradients by token, frozen and learning heads, memory."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxlora.engine.device import settling, settling_afterwards
from mlxlora.engine.token_loss import chunk_length, token_log_probs, with_slopes

V, D, P = 100, 16, 37


def product(rows: mx.array, weight: mx.array) -> mx.array:
    return rows @ weight.T / 3


def capped(rows: mx.array, weight: mx.array) -> mx.array:
    return mx.tanh(rows @ weight.T / 3) * 3  # a soft-cap, as gemma has it


@pytest.mark.parametrize("chunk", [1, 8, 37])
@pytest.mark.parametrize("kind", ["capped", "learns", "linear"])
def test_against_full_logits(chunk: int, kind: str) -> None:
    learns, linear = kind == "learns", kind == "linear"
    head = product if linear else capped
    keys = mx.random.split(mx.random.key(0), 4)
    weight, hidden = mx.random.normal((V, D), key=keys[0]), mx.random.normal((P, D), key=keys[1])
    targets, slope = mx.random.randint(0, V, (P,), key=keys[2]), mx.random.normal((P,), key=keys[3])

    def plain(hidden: mx.array, weight: mx.array) -> mx.array:
        logits = head(hidden, weight)
        picked = mx.take_along_axis(logits, targets[:, None], -1)[:, 0]
        return ((picked - mx.logsumexp(logits, -1)) * slope).sum()

    def ours(hidden: mx.array, weight: mx.array) -> mx.array:
        view = (lambda rows, learned, _: head(rows, learned[0])) if learns else (lambda rows, *_: head(rows, weight))
        found = token_log_probs(hidden, targets, view, [weight] if learns else [], chunk, linear=linear)
        return (found * slope).sum()

    wanted = (0, 1) if learns else (0,)
    expected = mx.value_and_grad(plain, argnums=wanted)(hidden, weight)
    found = mx.value_and_grad(ours, argnums=wanted)(hidden, weight)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        assert float(mx.abs(a - b).max()) < 1e-5


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("vocabulary", [151_936, 262_144])
def test_peak_is_at_most_two_bytes_a_logit(vocabulary: int, linear: bool) -> None:
    positions = 224
    weight, hidden = mx.random.normal((vocabulary, 8)), mx.random.normal((positions, 8))
    targets = mx.random.randint(0, vocabulary, (positions,))
    mx.eval(weight, hidden, targets)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    chunk = chunk_length(positions, vocabulary, linear=linear)

    def head(rows: mx.array, *_: object) -> mx.array:
        return rows @ weight.T

    with settling():
        known = with_slopes(hidden, targets, head, chunk, True) if linear else None
    with settling_afterwards():
        found = mx.value_and_grad(
            lambda hidden: token_log_probs(hidden, targets, head, [], chunk, linear=linear, known=known).sum()
        )(hidden)
    mx.eval(found)
    assert (mx.get_peak_memory() - before) / (positions * vocabulary) <= 2.0


def test_chunks_are_of_one_size() -> None:
    assert chunk_length(424, 21_704, linear=True) == 212  # of 192 each there would be a third
    assert chunk_length(1000, 151_936, linear=True) == 48
    assert chunk_length(0, 1000) == 1
    for positions in (1, 23, 24, 25, 59, 60, 61, 1000):
        length = chunk_length(positions, 1000, wanted=24)
        assert length <= 24  # never more than asked for
        assert -(-positions // length) == -(-positions // 24)


def test_the_loss_may_take_what_a_block_takes() -> None:
    inside = 2048 * 1024  # tokens in hidden states of a thousand numbers
    chunk = chunk_length(2048, 151_936, linear=True, inside=inside)
    assert 90 < chunk < 100
    assert 2 * 4 * chunk / 2048 <= 2  # bytes a logit
    assert chunk_length(2048, 151_936, linear=True, wanted=10, inside=inside) == 10
