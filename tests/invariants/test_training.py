"""What must not change the result: how a step is cut into micro-batches, what is kept of a block, fusing."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.adapters.inject import get_module, set_module
from mlxlora.engine.config import EngineConfig
from mlxlora.engine.engine import Engine
from mlxlora.objectives.sft import sft
from mlxlora.training.optimizer import OptimizerConfig
from tests import reference, tiny
from tests.rows import Rows, train

LENGTHS = [4, 500, 17, 61, 5, 230, 9, 33]
DESCENT = OptimizerConfig(
    name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=None
)


def adapted(family: str, **settings: Any) -> nn.Module:
    network = tiny.network(family)
    inject(network, AdapterConfig(**{"rank": 4, **settings}), seed=1)
    reference.awaken(network)
    return network


def step_of(family: str, size: int, accumulate: int) -> tuple[float, dict[str, mx.array]]:
    """Loss and gradient of one optimizer step over all rows: plain descent moves by exactly the gradient."""
    network = adapted(family)
    start = {name: mx.array(array) for name, array in _flat(network).items()}
    rows = Rows(reference.samples(LENGTHS, tiny.VOCABULARY), size)
    losses, end = train(network, rows, DESCENT, steps=1, accumulate=accumulate)
    return losses[0], {name: start[name] - end[name] for name in end}


def _flat(network: nn.Module) -> dict[str, mx.array]:
    from mlxlora.parameters import flat

    return flat(network.trainable_parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_accumulation_changes_nothing(family: str) -> None:
    """Rows of 4 to 500 tokens, as 1, 2, 4 or 8 micro-batches: a mean of means would be far off."""
    whole_loss, whole = step_of(family, 8, 1)
    for parts in (2, 4, 8):
        loss, gradient = step_of(family, 8 // parts, parts)
        assert loss == pytest.approx(whole_loss, abs=1e-5)
        assert reference.gradient_error(_tree(gradient), _tree(whole)) < 1e-5
    means = [
        reference.step(adapted(family), reference.padded([sample]))
        for sample in reference.samples(LENGTHS, tiny.VOCABULARY)
    ]
    naive = float(np.mean([value.item() / count.item() for value, count, _ in means]))
    assert abs(naive - whole_loss) > 1e-3, "the rows are too alike for this test to fail"


def _tree(flat: dict[str, mx.array]) -> Any:
    return tree_unflatten(list(flat.items()))


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_what_is_kept_of_a_block_changes_nothing(family: str, dropout: float) -> None:
    """The recompute of a block sees the masks that its first pass saw."""
    batch = reference.padded(reference.samples([23, 40, 9], tiny.VOCABULARY))
    found = {}
    for grade in ("none", "products", "inputs"):
        engine = Engine(adapted(family, dropout=dropout), EngineConfig(checkpoint_blocks=grade, compile="never"))
        total, _, _, gradients = engine.value_and_grad(sft, batch, mx.random.key(5))
        mx.eval(total, gradients)
        found[grade] = total.item(), gradients
        engine.close()
    for grade in ("products", "inputs"):
        assert found[grade][0] == pytest.approx(found["none"][0], rel=1e-6)
        assert reference.gradient_error(found[grade][1], found["none"][1]) < 5e-6
    if dropout:
        engine = Engine(adapted(family, dropout=dropout), EngineConfig(checkpoint_blocks="none", compile="never"))
        assert engine.value_and_grad(sft, batch, mx.random.key(6))[0].item() != found["none"][0]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "mixtral", "gpt2"])
def test_fused_is_the_adapter_on_the_base(family: str, kind: str) -> None:
    if (family, kind) == ("mixtral", "dora"):
        targets = ["attention"]
    else:
        targets = ["all-linear", "output"] if family in ("llama", "phi3") else ["all-linear"]
    network = adapted(family, type=kind, targets=targets)
    tokens = mx.array([[5, 17, 300, 2, 44, 260, 8, 99]])
    apart = np.array(network(tokens))
    plain = np.array(tiny.network(family)(tokens))
    for path in [path for path, module in network.named_modules() if hasattr(module, "fuse")]:
        set_module(network, path, get_module(network, path).fuse())
    assert not [path for path, module in network.named_modules() if hasattr(module, "fuse")]
    assert np.abs(apart - plain).max() > 1e-2
    np.testing.assert_allclose(np.array(network(tokens)), apart, rtol=0, atol=1e-4)
