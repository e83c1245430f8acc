"""The engine takes hold of one model, for as long as a step runs, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxlora import mlxlm
from mlxlora.adapters import AdapterConfig, inject
from mlxlora.engine import Engine, EngineConfig, packing_refusal
from mlxlora.errors import ConfigError, UnsupportedError
from mlxlora.objectives import sft
from tests import reference, tiny


def state(network: nn.Module) -> list[Any]:
    modules = [(path, type(module), dict(vars(module))) for path, module in network.named_modules()]
    classes = {type(module) for _, module in network.named_modules()}
    return [modules, {cls: (cls.__call__, dict(vars(cls))) for cls in classes}]


def test_nothing_is_left_behind() -> None:
    network, other = tiny.network("qwen3"), tiny.network("qwen3")
    inject(network, AdapterConfig(rank=2, dropout=0.1), seed=0)
    base = mlxlm.module("models.base")
    globals_before = dict(vars(mlxlm.module("models.qwen3"))), dict(vars(base))
    before, before_other = state(network), state(other)
    batch = reference.padded(reference.samples([9, 12], tiny.VOCABULARY))
    engine = Engine(network, EngineConfig())
    engine.value_and_grad(sft, batch, mx.random.key(0))
    engine.evaluate(sft, batch)
    engine.close()
    assert state(network) == before
    assert state(other) == before_other
    assert (dict(vars(mlxlm.module("models.qwen3"))), dict(vars(base))) == globals_before


def test_nothing_is_left_behind_by_an_exception() -> None:
    network = tiny.network("llama")
    inject(network, AdapterConfig(rank=2), seed=0)
    before = state(network)
    engine = Engine(network)

    def broken(scores: Any, batch: Any) -> Any:
        scores.token_log_probs(batch)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        engine.value_and_grad(broken, reference.padded(reference.samples([9], tiny.VOCABULARY)))
    assert state(network) == before


def test_other_objectives_get_gradients_by_token() -> None:
    """A preference-like objective: a function of sums of log-probabilities, not a sum over tokens."""
    network = tiny.network("llama")
    inject(network, AdapterConfig(rank=2), seed=0)
    reference.awaken(network)
    batch = reference.padded(reference.samples([9, 12], tiny.VOCABULARY))
    half = batch.targets.size // 2

    def prefer(scores: Any, batch: Any) -> Any:
        found = scores.token_log_probs(batch)
        margin = found[:half].sum() - found[half:].sum()
        return nn.softplus(-0.1 * margin), mx.array(1.0), {"margin": margin}

    found = Engine(network).value_and_grad(prefer, batch)
    wanted = Engine(network, EngineConfig(checkpoint_blocks="none", attention="plain")).value_and_grad(prefer, batch)
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-6)
    assert found[2]["margin"].item() == pytest.approx(wanted[2]["margin"].item(), rel=1e-5)
    assert reference.gradient_error(found[3], wanted[3]) < 1e-5


def test_packing_is_refused_with_the_reason() -> None:
    assert packing_refusal(tiny.network("llama")) is None
    assert "positions count from the start" in (packing_refusal(tiny.network("gpt2")) or "")
    network = tiny.network("gpt2")
    inject(network, AdapterConfig(rank=2), seed=0)
    made = reference.samples([9, 12], tiny.VOCABULARY)
    with pytest.raises(UnsupportedError, match="positions count"):
        Engine(network).value_and_grad(sft, reference.batch([made]))


@pytest.mark.parametrize("settings", [{"checkpoint_blocks": "product"}, {"loss_chunk": -1}, {"attention": "fast"}])
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EngineConfig(**settings)


def test_attention_is_linear_or_refused() -> None:
    network = tiny.network("deepseek_v3")
    inject(network, AdapterConfig(rank=2), seed=0)
    with pytest.raises(UnsupportedError, match="linear memory"):
        Engine(network, EngineConfig(attention="linear"))
    assert any("tokens × tokens" in note for note in Engine(network).notes)


@pytest.mark.usefixtures("in_step")
def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    network = tiny.network("llama")
    inject(network, AdapterConfig(rank=2), seed=0)
    peaks = []
    for length in (512, 2048):
        batch = reference.padded(reference.samples([length], tiny.VOCABULARY))
        engine = Engine(network, EngineConfig(checkpoint_blocks="inputs", loss_chunk=64, attention_chunk=32))
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(engine.value_and_grad(sft, batch))
        peaks.append(mx.get_peak_memory() - before)
        engine.close()
    assert peaks[1] < 5 * peaks[0]  # 4 times is the length, 16 times the square
