"""What the engine promises beyond its numbers: what is kept, how many shapes there are, and what objectives can ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxlora.adapters import AdapterConfig, LayerConfig, LoRALinear, inject
from mlxlora.data import Batch, BatchConfig
from mlxlora.data.batches import collate, plan_epoch
from mlxlora.data.sample import Sample
from mlxlora.engine import Engine, EngineConfig, account, tape
from mlxlora.engine.linear import Group, member
from mlxlora.memory import collect_garbage
from mlxlora.objectives.sft import sft
from tests import reference, tiny
from tests.machines import pretend_accelerator


@pytest.mark.parametrize("kept", [6, 1])
def test_nothing_is_kept_below_the_first_block_that_learns(kept: int) -> None:
    """What goes into a frozen block is gone when it has run; what comes out takes its place."""
    network = tiny.network("llama", num_hidden_layers=6)
    inject(network, AdapterConfig(rank=2, layers=2), seed=0)
    engine = Engine(network, EngineConfig(compile="never"))
    chain, batch = engine._chain, reference.padded(reference.samples([400], tiny.VOCABULARY))
    assert chain is not None
    layout = engine._layout(batch)

    def step() -> Any:
        return chain.run(sft, batch, layout, None, True, kept)

    mx.eval(step())
    collect_garbage()
    taken = account._observed(chain, step)
    row = 400 * 32 * 4  # bytes of what goes from block to block
    assert all(taken["forward", index].left < row / 2 for index in (1, 2, 3))
    assert all(taken["forward", index].left > row / 2 for index in (4, 5))
    assert [part for part in taken if part[0] == "backward"] == [("backward", 5), ("backward", 4)]
    engine.close()


def test_what_only_the_output_of_a_block_needs_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `inputs`, all products but the last are: the output is there already."""
    network = tiny.network("llama", num_hidden_layers=4)
    inject(network, AdapterConfig(rank=2), seed=0)
    engine = Engine(network, EngineConfig(checkpoint_blocks="inputs", compile="never"))
    batch = reference.padded(reference.samples([40], tiny.VOCABULARY))
    computed: list[mx.array] = []
    monkeypatch.setattr(tape, "settle", lambda *arrays: computed.extend(arrays))
    mx.eval(engine.value_and_grad(sft, batch))
    of_a_block = ["q", "k", "v", "o", "gate", "up", "down"]
    assert len(computed) == 4 * len(of_a_block) + 3 * len(of_a_block[:-1])
    engine.close()


def test_an_adapter_is_never_multiplied_out() -> None:
    """A B has as many numbers as the weight, and is dearer than the narrow way in all three of its uses."""
    width = 1024
    linear = nn.Linear(width, width, bias=False)
    linear.freeze()
    layer = LoRALinear.wrap(linear, LayerConfig(rank=4, scale=2.0, dropout=0.0))
    one = member(layer)
    assert one is not None
    group, x = Group([one]), mx.random.normal((1, 8, width))
    mx.eval(layer.parameters(), x)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    outs, zs = group.forward(x)
    slopes = mx.vjp(lambda x: group.replayed(x, outs, zs), [x], [outs[0]])[1]
    mx.eval(outs, slopes)
    assert mx.get_peak_memory() - before < width * width  # a quarter of it


def chat_samples(count: int) -> list[Sample]:
    """Log-normal lengths, as chats have them; their first part is a prompt."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.3, 0.7, count), 24, 1500).astype(int)
    return [
        Sample(random.integers(0, 512, length).astype(np.int32), (np.arange(length) > 0.6 * length).astype(np.float32))
        for length in lengths
    ]


@pytest.mark.parametrize(
    ("config", "most"),
    [(BatchConfig(), 72), (BatchConfig(tokens_per_batch=1536), 72), (BatchConfig(packing=True, max_length=1536), 12)],
)
def test_an_epoch_of_chats_has_few_shapes_and_little_padding(
    config: BatchConfig, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where steps are compiled: each shape of a batch, and each mask that differs by more than its arrays, is another
    trace of the blocks; positions come in few numbers beside."""
    pretend_accelerator(monkeypatch)
    network = tiny.network("llama")
    inject(network, AdapterConfig(rank=2), seed=0)
    engine = Engine(network, EngineConfig(compile="always"))
    made = chat_samples(2000)
    plan = plan_epoch(np.array([len(sample.tokens) for sample in made], np.int32), config, seed=0, epoch=0)
    blocks, ends, computed = set(), set(), 0
    for planned in plan:
        batch = engine._laid(collate(made, planned))
        kind = batch.tokens.shape, engine._layout(batch).kind
        blocks.add(kind)
        ends.add((*kind, batch.targets.size))
        computed += batch.tokens.size
    assert len(blocks) <= most < len(plan) and len(ends) <= 1.5 * most
    assert sum(len(sample.tokens) for sample in made) / computed > 0.95
    engine.close()


@dataclass(frozen=True, slots=True)
class Pairs(Batch):
    """The first half of the rows is preferred to the second; what a frozen model gives each token."""

    reference: mx.array | None = None
    owner: mx.array | None = None


def prefer(scores: Any, batch: Any) -> Any:
    """DPO: https://arxiv.org/abs/2305.18290."""
    gained = (scores.token_log_probs(batch) - batch.reference) * batch.weights
    by_row = mx.zeros(4).at[batch.owner].add(gained)
    margin = by_row[:2] - by_row[2:]
    return nn.softplus(-0.5 * margin).sum(), mx.array(2.0), {"margin": margin}


@pytest.mark.parametrize("grade", ["none", "products", "inputs"])
@pytest.mark.parametrize("compiled", ["always", "never"])
def test_a_preference_objective_trains_on_log_probs_by_token(grade: Any, compiled: Any) -> None:
    """With those of the model without its adapter, which come out of an evaluation, beside them in the batch."""
    network = tiny.network("llama")
    inject(network, AdapterConfig(rank=2), seed=0)
    batch = reference.padded(reference.samples([19, 33, 24, 12], tiny.VOCABULARY), pad_positions=2)
    engine = Engine(network, EngineConfig(checkpoint_blocks=grade, compile=compiled))

    def ask(scores: Any, batch: Any) -> Any:
        return mx.array(0.0), mx.array(1.0), {"each": scores.token_log_probs(batch)}

    before = engine.evaluate(ask, batch)[2]["each"]  # lora_b is zero: as if there were no adapter
    assert before.shape == batch.targets.shape
    owner = batch.loss_positions // batch.tokens.shape[1]
    fields = {name: getattr(batch, name) for name in Batch.__slots__}
    pairs = Pairs(**fields, reference=before, owner=owner)
    start = engine.value_and_grad(prefer, pairs)
    assert start[0].item() == pytest.approx(2 * np.log(2), rel=1e-6)
    reference.awaken(network)
    total, _, metrics, found = engine.value_and_grad(prefer, pairs)

    def plain(parameters: Any) -> mx.array:
        network.update(parameters)
        logits = network(batch.tokens).reshape(-1, tiny.VOCABULARY)[batch.loss_positions]
        each = mx.take_along_axis(logits, batch.targets[:, None], -1)[:, 0] - mx.logsumexp(logits, -1)

        class Scores:
            def token_log_probs(self, _: Any) -> mx.array:
                return each

        out: mx.array = prefer(Scores(), pairs)[0]
        return out

    parameters = network.trainable_parameters()
    expected, grads = mx.value_and_grad(plain)(parameters)
    network.update(parameters)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5) and metrics["margin"].shape == (2,)
    assert reference.gradient_error(found, grads) < 2e-5
    engine.close()
