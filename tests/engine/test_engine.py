"""The engine gives the numbers of the plain computation, for every kind of model, layer and batch."""

from __future__ import annotations

import statistics
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_unflatten

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.data import Batch
from mlxlora.engine import activations
from mlxlora.engine.config import EngineConfig
from mlxlora.engine.engine import Engine
from mlxlora.engine.exponential import exponential
from mlxlora.engine.masks import Steering, layout_of
from mlxlora.engine.packing import end_to_end
from mlxlora.objectives.sft import sft
from mlxlora.parameters import flat
from tests import reference, tiny

FAMILIES = [
    "llama",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "gpt2",
    "deepseek_v3",
    "gpt_oss",
    "cohere",
]
EVEN = [32, 32, 32]
LENGTHS = [23, 40, 9]


def agree(network: nn.Module, config: EngineConfig, *, dropout: bool = False, pad: int = 3) -> Engine:
    """Loss within 1e-6 and gradients within 1e-5 of the plain computation.

    For rows of one length, and for rows of many, which the engine lays end to end where the model allows it (dropout
    then falls on other places, so it is compared for the former only).
    """
    key = mx.random.key(5) if dropout else None
    engine = Engine(network, config)
    for lengths in (EVEN,) if dropout else (EVEN, LENGTHS):
        batch = reference.padded(reference.samples(lengths, tiny.VOCABULARY), pad_positions=pad)
        value, count, grads = reference.step(network, batch, key)
        total, weight, metrics, slopes = engine.value_and_grad(sft, batch, key)
        assert metrics == {}
        assert weight.item() == pytest.approx(count.item())
        assert total.item() == pytest.approx(value.item(), rel=1e-6)
        error = reference.gradient_error(slopes, grads)
        assert error < 1e-5 or error < 4 * rounding(network, batch, grads)
        if not dropout:
            assert engine.evaluate(sft, batch)[0].item() == pytest.approx(value.item(), rel=1e-6)
    engine.close()
    return engine


def rounding(network: nn.Module, batch: Batch, grads: Any) -> float:
    """How far the plain computation in float32 is from the same in float64 (much, where scores are capped steeply)."""
    copy = deepcopy(network)
    copy.set_dtype(mx.float64)
    with mx.stream(mx.cpu):
        return reference.gradient_error(grads, reference.step(copy, batch)[2])


def adapted(family: str, quantize: dict[str, Any] | None = None, **settings: Any) -> nn.Module:
    changes = settings.pop("changes", {})
    network = tiny.network(family, **changes)
    if quantize:
        nn.quantize(network, **quantize)
    if settings.get("type") == "full":
        network.unfreeze()
        return network
    inject(network, AdapterConfig(**{"rank": 4, **settings}), seed=1)
    reference.awaken(network)
    return network


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    agree(adapted(family), EngineConfig())


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("grade", ["none", "products", "inputs", 2])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.3])
def test_grades_of_recomputation_with_dropout(grade: Any, dropout: float) -> None:
    agree(adapted("llama", dropout=dropout), EngineConfig(checkpoint_blocks=grade), dropout=True)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "qwen3_moe"])
def test_packed_rows_are_their_samples_apart(family: str) -> None:
    network = adapted(family)
    made = reference.samples([23, 40, 9, 30, 17], tiny.VOCABULARY)
    value, _, grads = reference.step(network, reference.padded(made))
    for attention in ("linear", "plain"):
        engine = Engine(network, EngineConfig(attention=attention, attention_chunk=16))
        total, _, _, slopes = engine.value_and_grad(sft, reference.batch([made[:3], made[3:]]))
        assert total.item() == pytest.approx(value.item(), rel=1e-6)
        assert reference.gradient_error(slopes, grads) < 1e-5


def test_rows_laid_end_to_end() -> None:
    """Everything scored is found at its new place, and a batch with little padding is left alone."""
    for traced in (False, True):
        batch = reference.padded(reference.samples([73, 130, 29], tiny.VOCABULARY), pad_positions=3)
        joined = end_to_end(batch, traced=traced)
        assert joined.tokens.shape == (1, 256 if traced else 232)
        before, after = (one.tokens.reshape(-1)[one.loss_positions] for one in (batch, joined))
        assert mx.array_equal(before, after)
        assert joined.segments is not None
        segments: Any = joined.segments[0].tolist()
        assert [segments.count(number) for number in range(3)] == [72, 129, 28]
        assert end_to_end(joined, traced=traced) is joined
    even = reference.padded(reference.samples([32, 31, 32], tiny.VOCABULARY))
    assert end_to_end(even, traced=False) is even


def test_positions_begin_anew_in_each_document() -> None:
    """The angles of a document do not depend on where in the row it stands, so they are exact far from its start."""
    rope = nn.RoPE(8, base=100.0)
    x = mx.random.normal((1, 2, 4000, 8), key=mx.random.key(0))
    segments = mx.array([[0] * 3990 + [1] * 10])
    network = nn.Module()
    network.rope = rope
    steering = Steering(network)
    alone = rope(x[:, :, 3990:])
    for traced, same in ((False, True), (True, False)):
        with steering.with_layout(layout_of(segments, linear=True, chunk=0, traced=traced)):
            assert mx.array_equal(network.rope(x)[:, :, 3990:], alone).item() is same
    assert type(network.rope) is nn.RoPE


@pytest.mark.parametrize("compiled", ["always", "never"])
def test_padding_is_left_out_of_the_step(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model that documents can share is given has no padding; one that cannot pack is given the rows."""
    lengths = [60, 200, 90]
    seen: dict[str, list[Any]] = {}
    batch = reference.padded(reference.samples(lengths, tiny.VOCABULARY))
    for family in ("llama", "gpt2"):
        network = adapted(family)
        engine = Engine(network, EngineConfig(compile=compiled))
        shapes = seen.setdefault(family, [])
        layout = engine._layout

        def watched(given: Batch, layout: Any = layout, shapes: list[Any] = shapes) -> Any:
            shapes.append(given.tokens.shape)
            return layout(given)

        monkeypatch.setattr(engine, "_layout", watched)
        value, _, grads = reference.step(network, batch)
        total, _, _, slopes = engine.value_and_grad(sft, batch)
        assert total.item() == pytest.approx(value.item(), rel=1e-6)
        assert reference.gradient_error(slopes, grads) < 1e-5
    assert seen == {"llama": [(1, 384 if compiled == "always" else 352)], "gpt2": [(3, 200)]}


@pytest.mark.usefixtures("machine")
def test_compiled_step_with_new_weights() -> None:
    """A compiled step sees the parameters of the moment, and one trace serves batches of one shape."""
    network = adapted("llama")
    engine = Engine(network, EngineConfig(compile="always"))
    for seed in (3, 4):
        reference.awaken(network, seed)
        batch = reference.padded(reference.samples(LENGTHS, tiny.VOCABULARY, 0))
        value, _, grads = reference.step(network, batch)
        total, _, _, slopes = engine.value_and_grad(sft, batch)
        assert total.item() == pytest.approx(value.item(), rel=1e-6)
        assert reference.gradient_error(slopes, grads) < 1e-5


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base(bits: int) -> None:
    agree(adapted("llama", {"group_size": 32, "bits": bits}), EngineConfig())


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("quantize", [None, {"group_size": 32, "bits": 4}], ids=["dense", "4 bits"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_half_precision_is_as_near_to_the_truth_as_the_plain_computation(family: str, quantize: Any) -> None:
    """Loss and gradients in bfloat16 against the same model's in float32; of one batch, rounding may favour either."""
    network = adapted(family, quantize)
    network.set_dtype(mx.bfloat16)
    exact = deepcopy(network)
    exact.set_dtype(mx.float32)
    engine, losses, times = Engine(network), [], []
    for seed in range(3):
        batch = reference.padded(reference.samples(EVEN, tiny.VOCABULARY, seed))
        truth, _, slopes = reference.step(exact, batch)
        plain, _, plain_slopes = reference.step(network, batch)
        total, _, _, found = engine.value_and_grad(sft, batch)
        error, plain_error = (float(mx.abs(one.astype(mx.float32) - truth) / truth) for one in (total, plain))
        losses.append(error / max(2 * plain_error, 2e-3))
        assert {array.dtype for array in flat(found).values()} == {mx.bfloat16}
        times.append(reference.gradient_error(found, slopes) / reference.gradient_error(plain_slopes, slopes))
    assert statistics.median(losses) <= 1, losses
    assert statistics.median(times) <= 1.5, times


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "settings",
    [
        {"layers": 1},
        {"targets": ["attention"]},
        {"targets": ["output", "all-linear"]},
        {"targets": ["output", "all-linear"], "dropout": 0.2, "changes": {"tie_word_embeddings": False}},
        {"type": "full"},
        {"type": "full", "changes": {"tie_word_embeddings": True}},
    ],
)
def test_what_learns(settings: dict[str, Any]) -> None:
    agree(adapted("llama", **settings), EngineConfig())


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.2, "checkpoint": "none"},
        {"dropout": 0.2, "checkpoint": "products"},
        {"type": "dora", "targets": ["attention"], "checkpoint": "inputs"},
        {"targets": ["kv_b_proj", "mlp.gate"], "quantize": {"group_size": 32, "bits": 8}, "checkpoint": "products"},
    ],
)
def test_latent_attention(settings: dict[str, Any]) -> None:
    """The split `kv_b_proj`, and a router that holds its matrix itself, in blocks that share what is compiled."""
    settings = dict(settings)
    grade, dropout = settings.pop("checkpoint"), bool(settings.get("dropout"))
    wide = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    network = adapted("deepseek_v3", changes={**wide, "num_hidden_layers": 3}, **settings)
    engine = agree(network, EngineConfig(checkpoint_blocks=grade), dropout=dropout)
    assert all("attention is of another kind" in note for note in engine.notes), "block by block, as ever"


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_live_adapters_are_each_block_s_own(family, tmp_path):
    """Arrays beside the parameters (adapters that live on a model) must not be shared by blocks of one structure."""
    from mlxlora.adapters import attach, collect, save_adapter
    from mlxlora.training.shapes import Shape, synthetic

    trained = tiny.network(family, num_hidden_layers=3)
    inject(trained, AdapterConfig(rank=4, targets=["all-linear", *["mlp.gate"] * (family != "llama")]))
    for index, (path, array) in enumerate(flat(trained.trainable_parameters()).items()):
        trained.update(tree_unflatten([(path, mx.random.normal(array.shape, key=mx.random.key(index)) * 0.3)]))
    save_adapter(tmp_path / "adapter", collect(trained))
    network = tiny.network(family, num_hidden_layers=3)
    attach(network, [str(tmp_path / "adapter")])
    batch = synthetic(Shape(2, 24, 0.5), tiny.VOCABULARY)
    engine, plain = Engine(network), Engine(trained)
    assert all("attention is of another kind" in note for note in engine.notes)
    found, expected = (one.evaluate(sft, batch)[0].item() for one in (engine, plain))
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_block_takes_two_exponentials_of_its_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny.network("llama", num_hidden_layers=3)
    inject(network, AdapterConfig(rank=2))
    batch = Batch(mx.array([[3, 4, 5, 6]]), mx.array([0, 1, 2]), mx.array([4, 5, 6]), mx.ones(3))
    engine = Engine(network, EngineConfig(checkpoint_blocks="products"))
    engine.value_and_grad(sft, batch)  # made ready
    taken: list[Any] = []
    monkeypatch.setattr(activations, "exponential", lambda x, by: (taken.append(x.shape), exponential(x, by))[1])
    engine.value_and_grad(sft, batch)
    assert len(taken) == 3 * 2  # there and back


def test_the_gradient_of_the_head_is_products_alone(tmp_path: Path) -> None:
    network = tiny.network("llama")
    inject(network, AdapterConfig(rank=2))
    engine = Engine(network)
    rows = mx.random.normal((4, network.args.hidden_size))
    view = engine._chain.ends.head  # type: ignore[union-attr]
    scores = view.scores(rows, True, None)
    slope = mx.random.normal((4, tiny.VOCABULARY))
    grads = mx.vjp(lambda rows: scores._head(rows, (), 0), [rows], [slope])[1]
    mx.export_to_dot(str(tmp_path / "graph"), *grads)
    drawn = (tmp_path / "graph").read_text()
    assert "Matmul" in drawn
    assert "Scatter" not in drawn  # a CPU adds up one number after the other


def test_waiting_for_each_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny.network("llama", num_hidden_layers=3)
    inject(network, AdapterConfig(rank=2))
    batch = Batch(mx.array([[3, 4, 5, 6]]), mx.array([0, 1, 2]), mx.array([4, 5, 6]), mx.ones(3))
    waited: list[int] = []
    counts = []
    whole = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (waited.append(len(arrays)), whole(*arrays))[1])
    found = []
    for wait in (False, True):
        engine = Engine(network, EngineConfig(wait=wait))
        waited.clear()
        _, _, _, grads = engine.value_and_grad(sft, batch)
        counts.append(len(waited))
        found.append(flat(grads))
        engine.close()
    assert counts[1] >= counts[0] + 2 * 3  # each of three blocks, there and back
    assert all(mx.array_equal(found[0][name], found[1][name]) for name in found[0])
