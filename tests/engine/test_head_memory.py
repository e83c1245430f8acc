"""The peak of the loss of whole models with large vocabularies, whatever their head is."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.data.sample import Batch
from mlxlora.engine import Engine, EngineConfig
from mlxlora.memory import collect_garbage
from mlxlora.objectives.sft import sft
from tests import reference, tiny

POSITIONS = 256
SMALL: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}


def made(kind: str, vocabulary: int) -> nn.Module:
    """A model whose head is of that kind."""
    family = {"scaled": "cohere", "capped": "gemma2"}.get(kind, "llama")
    changes: dict[str, Any] = {"vocab_size": vocabulary}
    if family == "llama":
        changes["tie_word_embeddings"] = kind in ("tied", "tied and learned")
    network = tiny.network(family, **SMALL, **changes)
    if kind == "quantized":
        nn.quantize(network, group_size=32, bits=4)
    if kind in ("learned", "tied and learned"):
        network.unfreeze()
        return network
    inject(network, AdapterConfig(rank=2, targets=["lm_head"] if kind == "adapted" else []), seed=1)
    reference.awaken(network)
    return network


@pytest.mark.parametrize(
    ("kind", "vocabulary"),
    [
        ("scaled", 151_936),  # frozen, and tied
        ("quantized", 151_936),
        ("learned", 151_936),
        ("tied and learned", 151_936),
        ("capped", 151_936),
        ("adapted", 151_936),
    ],
)
def test_peak_is_at_most_two_bytes_a_logit(kind: str, vocabulary: int) -> None:
    """Of a step of a model that is nearly all head. Beside the loss lie a weight that was packed, or the gradient of
    one that learns."""
    network = made(kind, vocabulary)
    engine = Engine(network, EngineConfig(compile="never"))
    tokens = mx.random.randint(0, vocabulary, (1, POSITIONS + 1))
    batch = Batch(tokens[:, :-1], mx.arange(POSITIONS), tokens[0, 1:], mx.ones(POSITIONS))
    mx.eval(batch.tokens, batch.targets)
    collect_garbage()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = engine.value_and_grad(sft, batch)
    mx.eval(out)
    weight = vocabulary * SMALL["hidden_size"] * 4
    # unpacking takes two more; of a gradient there are the sum so far, a chunk's, and their sum
    beside = 3 * weight if kind in ("quantized", "learned", "tied and learned") else 0
    peak = mx.get_peak_memory() - before - beside
    engine.close()
    assert 0.4 < peak / (POSITIONS * vocabulary) <= 2.0
