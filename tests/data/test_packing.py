"""A packed epoch has the losses and gradients of the same samples unpacked, through the engine."""

from __future__ import annotations

from typing import Any

import pytest
from mlx.utils import tree_map

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.data import BatchConfig, Dataset, SamplesConfig, collate, from_rows, plan_epoch
from mlxlora.engine import Engine, EngineConfig
from mlxlora.objectives.sft import sft
from mlxlora.parameters import flat
from mlxlora.tokenizer import Tokenizer
from tests import reference, tiny


def epoch(engine: Engine, data: Dataset, config: BatchConfig) -> tuple[float, float, Any]:
    """Sum of losses, sum of weights and sum of gradients over all batches of an epoch."""
    loss = weight = 0.0
    slopes: Any = None
    for planned in plan_epoch(data.lengths, config, seed=0, epoch=0):
        total, count, _, grads = engine.value_and_grad(sft, collate(data, planned))
        loss, weight = loss + float(total), weight + float(count)
        slopes = grads if slopes is None else tree_map(lambda a, b: a + b, slopes, grads)
    return loss, weight, slopes


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_is_unpacked(family: str, tokenizer: Tokenizer) -> None:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    said = [(" ".join(words[: i % 8 + 1]), " ".join(words[i % 5 :])) for i in range(12)]
    rows = [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] for asked, answer in said]
    data = from_rows(rows, tokenizer, SamplesConfig())
    network = tiny.network(family)
    inject(network, AdapterConfig(rank=4), seed=1)
    reference.awaken(network)
    engine = Engine(network, EngineConfig(compile="never"))
    results = [
        epoch(engine, data, config)
        for config in (BatchConfig(batch_size=1), BatchConfig(batch_size=5), BatchConfig(packing=True, max_length=128))
    ]
    loss, weight, slopes = results[0]
    assert weight == data.trained.sum() and flat(slopes)
    for other_loss, other_weight, other_slopes in results[1:]:
        assert other_weight == weight
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert reference.gradient_error(other_slopes, slopes) < 1e-5
