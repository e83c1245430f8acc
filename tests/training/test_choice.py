"""What is chosen when memory is short, and what is never changed."""

from __future__ import annotations

from typing import Any

import pytest

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.engine import EngineConfig
from mlxlora.engine.account import Account
from mlxlora.engine.config import Grade
from mlxlora.errors import ConfigError, UnsupportedError
from mlxlora.objectives.sft import sft
from mlxlora.training.choice import Prepared, prepare, refusal, refuse_hopeless, settings
from mlxlora.training.config import TrainingConfig
from mlxlora.training.forecast import Forecaster
from mlxlora.training.optimizer import OptimizerConfig
from mlxlora.training.shapes import Shape
from tests import tiny

LENGTH = 256
PLENTY = 10**10
GRADES: tuple[Grade, ...] = ("products", "inputs")
MB = 1_000_000
BLOCKS = 8
UNEVEN: dict[int, int] = {}  # what the products of so many blocks take beyond their share
# what a step takes, in MB: (kept, rows) → all of it, and of that the loss where it decides
TAKES = {
    ("products", 4): (90, 0), ("products", 2): (60, 0), ("products", 1): (45, 0),
    ("none", 4): (95, 0), ("none", 2): (65, 0), ("none", 1): (50, 0),
    ("inputs", 4): (55, 0), ("inputs", 2): (40, 0), ("inputs", 1): (30, 20),
}  # fmt: skip


def shapes(training: TrainingConfig, unpadded: bool) -> tuple[Shape, Shape | None]:
    rows = training.batch_size or (training.tokens_per_batch or 4 * LENGTH) // LENGTH
    return Shape(rows, LENGTH, 0.5), None


@pytest.fixture(autouse=True)
def prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a known price instead of real ones; nothing lies in memory beside."""

    def step(self: Forecaster, shape: Shape, *, gradients: bool = True) -> Account:
        self.weights = self.update = 0
        config = self.engine.config
        kept = config.checkpoint_blocks
        if isinstance(kept, int):
            low, high = (TAKES[grade, shape.rows][0] for grade in ("inputs", "products"))
            whole, loss = low + (high - low) * (kept - 1) / (BLOCKS - 1) + UNEVEN.get(kept, 0), 0
        else:
            whole, loss = TAKES[kept, shape.rows]
        whole = round(whole * shape.length / LENGTH)
        by_chunk = loss - loss * config.loss_chunk // 128 if config.loss_chunk else 0
        return Account((whole - by_chunk) * MB, MB, (loss - by_chunk) * MB, 1.0)

    monkeypatch.setattr(Forecaster, "step", step)


def ready(limit: int, training: TrainingConfig, family: str = "llama") -> Prepared:
    blocks: dict[str, Any] = {"num_hidden_layers": BLOCKS} if family == "llama" else {}
    network = tiny.network(family, **blocks)
    inject(network, AdapterConfig(rank=4))
    made = prepare(
        network, EngineConfig(), OptimizerConfig(), sft, training, shapes, vocabulary=tiny.VOCABULARY, limit=limit
    )
    made.engine.close()
    return made


def test_the_order_of_what_is_tried() -> None:
    found = [
        (one.checkpoint_blocks, one.batch_size, one.accumulate)
        for one in settings(TrainingConfig(accumulate=3), GRADES)
    ]
    assert found == [
        ("products", 4, 3), ("products", 2, 6), ("products", 1, 12),
        ("inputs", 4, 3), ("inputs", 2, 6), ("inputs", 1, 12),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "training",
    [
        TrainingConfig(batch_size=4, accumulate=2),
        TrainingConfig(tokens_per_batch=1000),
        TrainingConfig(checkpoint_blocks=True, batch_size=3),
        TrainingConfig(checkpoint_blocks="none", batch_size=1, loss_chunk=7),
    ],
)
def test_what_is_set_is_never_changed(training: TrainingConfig) -> None:
    for one in settings(training, GRADES):
        assert (one.batch_size, one.tokens_per_batch, one.accumulate, one.loss_chunk) == (
            training.batch_size, training.tokens_per_batch, training.accumulate, training.loss_chunk,
        )  # fmt: skip
        assert training.blocks in ("auto", one.checkpoint_blocks)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (99, ("products", 4, 1)),
        (65, ("products", 2, 2)),
        (58, (7, 2, 2)),  # not one row with all products: 256 tokens do not fill a device
        (45, (2, 2, 2)),
        (42, ("inputs", 2, 2)),
        (35, (3, 1, 4)),
        (31, ("inputs", 1, 4)),
    ],
)
def test_the_fastest_that_fits_is_chosen(limit: int, expected: tuple[Any, int, int]) -> None:
    free = TrainingConfig()
    made = ready(limit * MB, free)
    chosen = made.choice.training
    assert chosen is not None
    assert (chosen.checkpoint_blocks, chosen.batch_size, chosen.accumulate) == expected
    assert made.choice.forecast.peak <= limit * MB
    assert made.engine.config.checkpoint_blocks == expected[0]
    assert bool(made.choice.notices(free, limit)) == (expected[2] > 1)
    assert made.choice.kept(free) == {"batch_size": expected[1], "accumulate": expected[2]}
    assert made.choice.kept(TrainingConfig(batch_size=4)) == {}
    assert ("would take" in made.choice.why()) == (limit < 90)
    assert made.choice.flags()["checkpoint_blocks"] == expected[0]


@pytest.mark.parametrize("uneven", [-4, 0, 4])
def test_as_many_products_as_fit(uneven: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the first guess was: the last two forecasts are that of what was chosen and of one block more."""
    monkeypatch.setitem(globals(), "UNEVEN", dict.fromkeys(range(BLOCKS), uneven))
    made = ready(50 * MB, TrainingConfig())
    more, chosen = made.choice.tried[-2:]
    assert isinstance(chosen.checkpoint_blocks, int)
    assert more.checkpoint_blocks in (chosen.checkpoint_blocks + 1, "products")
    assert chosen.peak <= 50 * MB < more.peak
    assert made.engine.config.checkpoint_blocks == chosen.checkpoint_blocks


@pytest.mark.parametrize(("limit", "expected"), [(99, ("none", 4)), (68, ("none", 2)), (58, ("inputs", 4))])
def test_a_model_whose_step_is_one_graph_keeps_everything_or_inputs(limit: int, expected: tuple[str, int]) -> None:
    made = ready(limit * MB, TrainingConfig(), "gemma4_text")
    assert any("one graph" in note for note in made.engine.notes)
    chosen = made.choice.training
    assert chosen is not None and (chosen.checkpoint_blocks, chosen.batch_size) == expected
    assert {one.checkpoint_blocks for one in made.choice.tried} <= {"none", "inputs"}


def test_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"upper {BLOCKS + 1} blocks were asked for; this model has {BLOCKS}\."):
        ready(99 * MB, TrainingConfig(checkpoint_blocks=BLOCKS + 1))


def test_fewer_logits_at_a_time_where_the_loss_decides() -> None:
    made = ready(20 * MB, TrainingConfig())
    chosen = made.choice.training
    assert chosen is not None and chosen.loss_chunk is not None and chosen.loss_chunk < 64
    assert made.engine.config.loss_chunk == chosen.loss_chunk == made.choice.flags()["loss_chunk"]
    assert ready(20 * MB, TrainingConfig(loss_chunk=128)).choice.training is None  # refused, not changed


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    def message(limit: int, **training: Any) -> str:
        options = TrainingConfig(**training)
        made = ready(limit * MB, options)
        assert made.choice.training is None
        return str(refusal(made.forecaster, made.choice, options, limit * MB))

    assert "--training.batch_size 1 --training.accumulate 8" in message(35, batch_size=4, accumulate=2)
    assert "--training.tokens_per_batch 256" in message(35, tokens_per_batch=1024)
    assert "--samples.max_length 11" in message(15, loss_chunk=128)
    assert "--training.checkpoint_blocks inputs" in message(20, checkpoint_blocks="products")
    assert "convert --quantize" in message(1, loss_chunk=128)


def test_a_hopeless_run_is_refused_before_anything_is_allocated() -> None:
    network = tiny.network("llama")
    inject(network, AdapterConfig(type="full"))
    refuse_hopeless(network, OptimizerConfig(), PLENTY)
    with pytest.raises(UnsupportedError, match="moments"):
        refuse_hopeless(network, OptimizerConfig(), 300_000)
