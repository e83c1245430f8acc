"""The plain computation: full logits of every position, one graph, `mx.value_and_grad`. Tests hold the engine against
it.

Also batches of random samples, padded and packed, and the adapter layers of a network made to do something.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

from mlxlora.data.sample import Batch, Sample
from mlxlora.engine.anatomy import dissect
from mlxlora.engine.dropout import set_keys, split_key
from mlxlora.parameters import flat


def samples(lengths: list[int], vocabulary: int, seed: int = 0) -> list[Sample]:
    """Random samples, the first part of each without weight, as a prompt is, and some weights other than 1."""
    random = np.random.default_rng(seed)
    made = []
    for length in lengths:
        weights = np.where(np.arange(length) >= length // 3, random.choice([1.0, 1.0, 0.5], length), 0.0)
        weights[0] = 0
        made.append(Sample(random.integers(0, vocabulary, length).astype(np.int32), weights.astype(np.float32)))
    return made


def batch(rows: list[list[Sample]], *, pad_positions: int = 0, first: int = 0) -> Batch:
    """One batch: each row holds the samples of one list, one after the other."""
    length = max(sum(len(sample.tokens) for sample in row) for row in rows)
    tokens = np.zeros((len(rows), length), np.int32)
    segments = np.full((len(rows), length), -1, np.int32)
    positions, targets, weights = [], [], []
    for index, row in enumerate(rows):
        at = 0
        for number, sample in enumerate(row):
            size = len(sample.tokens)
            tokens[index, at : at + size] = sample.tokens
            segments[index, at : at + size] = number
            for offset in np.flatnonzero(sample.weights):
                positions.append(index * length + at + offset - 1)
                targets.append(sample.tokens[offset])
                weights.append(sample.weights[offset])
            at += size
    blank = [0] * pad_positions
    return Batch(
        tokens=mx.array(tokens),
        loss_positions=mx.array(np.array(positions + blank, np.int32)),
        targets=mx.array(np.array(targets + blank, np.int32)),
        weights=mx.array(np.array(weights + blank, np.float32)),
        segments=mx.array(segments) if any(len(row) > 1 for row in rows) else None,
        samples=tuple(range(first, first + sum(len(row) for row in rows))),
    )


def padded(made: list[Sample], **options: Any) -> Batch:
    """One sample a row."""
    return batch([[sample] for sample in made], **options)


def step(network: nn.Module, given: Batch, key: mx.array | None = None) -> tuple[mx.array, mx.array, Any]:
    """`(sum, count, gradients)` of the weighted negative log-likelihood of a padded batch, computed plainly."""
    anatomy = dissect(network, [])

    def total(parameters: Any) -> mx.array:
        network.update(parameters)
        set_keys(anatomy, None if key is None else split_key(key, len(anatomy.blocks)))
        logits = network(given.tokens).astype(mx.float32)
        rows = logits.reshape(-1, logits.shape[-1])[given.loss_positions]
        log_probs = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
        picked = mx.take_along_axis(log_probs, given.targets[:, None], axis=-1)[:, 0]
        return -(given.weights * picked).sum()

    before = network.trainable_parameters()
    value, grads = mx.value_and_grad(total)(before)
    network.update(before)
    set_keys(anatomy, None)
    mx.eval(value, grads)
    return value, given.weights.sum(), grads


def awaken(network: nn.Module, seed: int = 7) -> None:
    """Random numbers in every adapter array, so that all of them have a gradient."""
    key = mx.random.key(seed)
    names = list(flat(network.trainable_parameters()))
    keys = dict(zip(names, mx.random.split(key, max(1, len(names))), strict=False))

    def draw(name: str, array: mx.array) -> mx.array:
        if not name.rsplit(".", 1)[-1].startswith("lora_"):
            return array
        return 0.1 * mx.random.normal(array.shape, key=keys[name])

    network.update(tree_map_with_path(draw, network.trainable_parameters()))
    mx.eval(network.parameters())


def gradient_error(found: Any, expected: Any) -> float:
    """The largest relative difference (by norm) of any gradient, against the largest norm of its kind of array."""
    given, wanted = flat(found), flat(expected)
    assert sorted(given) == sorted(wanted)
    norms = {name: float(mx.linalg.norm(array.astype(mx.float32).flatten())) for name, array in wanted.items()}
    floor = 1e-3 * max(norms.values())
    worst = 0.0
    for name, array in wanted.items():
        assert given[name].shape == array.shape, name
        difference = float(mx.linalg.norm((given[name] - array).astype(mx.float32).flatten()))
        worst = max(worst, difference / max(norms[name], floor))
    return worst
