"""Two ways are compared before one is trusted: half precision must not make them look different, nor alike."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxlora import mlxlm
from mlxlora.adapters import AdapterConfig, inject
from mlxlora.engine import Engine, packing_refusal, precision
from mlxlora.parameters import flat
from tests import reference, tiny
from tests.architectures import small


def deep(family: str, quantized: bool) -> nn.Module:
    """Random weights and six blocks: rounding to bfloat16 moves their gradients by some tenths."""
    network = tiny.network(family, num_hidden_layers=6, hidden_size=64, dtype=mx.bfloat16)
    if quantized:
        nn.quantize(network, group_size=32, bits=4, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    inject(network, AdapterConfig(rank=4), seed=1)
    reference.awaken(network)
    return network


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rounding_is_no_reason_for_a_plainer_way(family: str, quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network = deep(family, quantized)
    before = {name: (array.dtype, array) for name, array in flat(network.parameters()).items()}
    engine = Engine(network)
    assert engine.notes == [] and engine.grades == ("products", "inputs")
    assert packing_refusal(network) is None
    after = flat(network.parameters())
    assert all(after[name] is array and array.dtype == dtype for name, (dtype, array) in before.items())
    monkeypatch.setattr(precision, "recommended", lambda: 0)
    differ = [note for note in Engine(network).notes if "differ" in note]
    assert len(differ) == 2  # attention and blocks: without room for float32 nothing is trusted


def test_in_half_precision_what_is_wrong_stays_wrong() -> None:
    """What enters its blocks beside the hidden states is taken for those."""
    network = mlxlm.build(small.config("talkie"))
    zeros = {name: value for name, value in flat(network.parameters()).items() if not mx.any(value != 0).item()}
    network.load_weights([(name, 0.1 * mx.random.normal(value.shape)) for name, value in zeros.items()], strict=False)
    network.set_dtype(mx.bfloat16)
    inject(network, AdapterConfig(rank=4), seed=1)
    reference.awaken(network)
    assert any("one graph" in note for note in Engine(network).notes)
