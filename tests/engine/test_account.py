"""What the engine says a step takes, against what a step then takes."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.data.sample import Batch
from mlxlora.engine import Engine, EngineConfig, head
from mlxlora.engine.account import Taken, peak
from mlxlora.engine.device import on_cpu
from mlxlora.memory import collect_garbage
from mlxlora.objectives.sft import sft
from tests import tiny

LAYERS = 6
# bytes of the largest array of a block, of which one more may lie there even in step: of two rows of 200 tokens its
# widest product, or the scores of all pairs, where attention is of a kind that has them
WIDEST, SCORES = 2 * 200 * 160 * 4, 2 * 4 * 200 * 200 * 4


@pytest.fixture(autouse=True)
def nothing_of_earlier_tests() -> None:
    """What went with them frees memory when Python looks for it, while something is measured here."""
    collect_garbage()


def prepared(family: str, adapter: AdapterConfig, grade: Any) -> tuple[Engine, Batch]:
    network = tiny.network(family, num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=160)
    inject(network, adapter)
    tokens = mx.arange(2 * 200).reshape(2, 200) % tiny.VOCABULARY
    places = mx.arange(0, 390, 2)
    batch = Batch(tokens, places, tokens.flatten()[places + 1], mx.ones(places.size))
    return Engine(network, EngineConfig(checkpoint_blocks=grade, loss_chunk=64)), batch


def real(engine: Engine, batch: Batch) -> int:
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(engine.value_and_grad(sft, batch, mx.random.key(0)))
    return mx.get_peak_memory() - before


@pytest.mark.usefixtures("in_step")
@pytest.mark.parametrize(
    ("family", "adapter", "grade", "largest"),
    [
        ("llama", AdapterConfig(rank=4), "products", WIDEST),
        ("llama", AdapterConfig(rank=4, layers=3), "inputs", WIDEST),
        ("llama", AdapterConfig(type="full"), "inputs", WIDEST),
        ("llama", AdapterConfig(rank=4), 3, WIDEST),
        ("gemma3", AdapterConfig(rank=4), "products", WIDEST),
        ("deepseek_v3", AdapterConfig(rank=4), "products", SCORES),
    ],
    ids=["lora", "upper-blocks", "full", "half", "two-kinds", "experts"],
)
def test_a_few_blocks_tell_what_all_take(family: str, adapter: AdapterConfig, grade: Any, largest: int) -> None:
    engine, batch = prepared(family, adapter, grade)
    misses = []
    for _ in range(3):  # threads that meet otherwise than usual make one miss; what is told wrongly misses each time
        found = engine.account(sft, batch, mx.random.key(0))
        assert found is not None and found.seconds > 0
        taken = real(engine, batch)
        misses.append(abs(found.peak - taken) / (largest + 0.025 * taken))
    assert min(misses) <= 1, misses
    engine.close()


@pytest.mark.usefixtures("in_step")
def test_what_all_blocks_share_is_counted_once() -> None:
    """Tables of rotary positions: one pair for the sliding layers, one for the others, whatever their number."""
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 64, "sliding_window_pattern": 2}
    small |= {"num_attention_heads": 1, "num_key_value_heads": 1}  # the tables are large beside what else there is
    network = tiny.network("gemma3", num_hidden_layers=6, **small)
    inject(network, AdapterConfig(rank=4))
    places = mx.arange(0, 300, 100)
    tokens = mx.arange(300).reshape(1, 300) % tiny.VOCABULARY
    batch = Batch(tokens, places, tokens.flatten()[places + 1], mx.ones(places.size))
    engine = Engine(network, EngineConfig(checkpoint_blocks="inputs"))
    found = engine.account(sft, batch, mx.random.key(0))
    assert found is not None
    assert found.peak == pytest.approx(real(engine, batch), abs=150_000)  # the tables: 460,800
    engine.close()


@pytest.mark.skipif(not on_cpu(), reason="elsewhere a quantized head is not unpacked")
def test_a_quantized_head_is_unpacked_before_there_are_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking takes twice its result: together with the logits, the peak would hang on which thread is quicker."""
    network = tiny.network("llama", hidden_size=64)
    nn.quantize(network, group_size=32, bits=4)
    inject(network, AdapterConfig(rank=4))
    _, batch = prepared("llama", AdapterConfig(rank=4), "products")
    engine = Engine(network, EngineConfig())
    first: list[Any] = []
    monkeypatch.setattr(head, "settle", lambda *arrays: first.extend(array.shape for array in arrays))
    mx.eval(engine.value_and_grad(sft, batch, mx.random.key(0)))
    assert first[:1] == [(tiny.VOCABULARY, 64)]
    engine.close()


def test_nothing_of_a_batch_outlives_its_step() -> None:
    """Whatever lengths the batches of a run have."""
    engine, _ = prepared("llama", AdapterConfig(rank=4, layers=3), "products")

    def step(length: int) -> None:
        tokens = mx.arange(length).reshape(1, length) % tiny.VOCABULARY
        places = mx.arange(0, length - 2, 2)
        batch = Batch(tokens, places, tokens.flatten()[places + 1], mx.ones(places.size))
        mx.eval(engine.value_and_grad(sft, batch, mx.random.key(0)))
        mx.eval(engine.evaluate(sft, batch))

    step(300)
    mx.synchronize()
    before = mx.get_active_memory()
    for length in range(290, 300):
        step(length)
    mx.synchronize()
    assert mx.get_active_memory() - before < 30_000  # ten pairs of tables are 380,000
    engine.close()


@pytest.mark.parametrize("checkpoint", ["inputs", "none"])
def test_no_array_waits_for_the_garbage_collector(checkpoint: Any) -> None:
    """A cycle of references would let a block's insides live on by chance."""
    engine, batch = prepared("llama", AdapterConfig(rank=4, dropout=0.1), checkpoint)
    mx.eval(engine.value_and_grad(sft, batch, mx.random.key(0)))
    collect_garbage()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        mx.eval(engine.value_and_grad(sft, batch, mx.random.key(0)))
        mx.eval(engine.evaluate(sft, batch))
        gc.collect()
        assert not [type(one) for one in gc.garbage if isinstance(one, mx.array)]
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()


def test_a_measured_step_is_the_same_step_afterwards() -> None:
    engine, batch = prepared("llama", AdapterConfig(rank=4, dropout=0.2), "products")
    before = engine.value_and_grad(sft, batch, mx.random.key(3))
    engine.account(sft, batch, mx.random.key(0))
    after = engine.value_and_grad(sft, batch, mx.random.key(3))
    assert before[0].item() == after[0].item()
    assert len(dict(after[3])) == len(dict(before[3]))


def test_the_peak_is_that_of_the_parts_in_their_order() -> None:
    parts = [Taken(5, 3, 0.0), Taken(4, 3, 0.0), Taken(9, 0, 0.0), Taken(2, -3, 0.0), Taken(2, -3, 0.0)]
    assert peak(parts) == 3 + 3 + 9
    assert peak(parts[:2]) == 7 and peak([]) == 0
