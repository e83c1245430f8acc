"""What a run leaves open of its memory, and what is chosen for it: the fastest that fits.

In the order in which they are tried: what is kept of each block (see `Engine.grades`), under each the rows of a
micro-batch (4, 2, 1; a step sees as many samples whatever they are, in more micro-batches), and where the loss is what
takes the most, the number of tokens whose logits exist at a time. Halving a batch costs little as long as it fills the
device, so it comes before the second forward pass of `inputs`. Where the inputs of all blocks fit and the products of
all do not, the products of as many upper blocks are kept as there is room for: each spares the second forward pass of a
block. What the user has set is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.nn as nn

from mlxlora.data import DataSplits, SamplesConfig
from mlxlora.engine import Engine, EngineConfig, Objective
from mlxlora.engine.config import CheckpointBlocks
from mlxlora.engine.token_loss import chunk_length
from mlxlora.errors import UnsupportedError
from mlxlora.files import human_bytes
from mlxlora.parameters import bytes_of, flat
from mlxlora.training.config import ROWS, TrainingConfig
from mlxlora.training.forecast import Forecast, Forecaster
from mlxlora.training.optimizer import Optimizer, OptimizerConfig, build
from mlxlora.training.shapes import Shape, largest

ShapesOf = Callable[[TrainingConfig, bool], tuple[Shape, Shape | None]]
FILLS = 512  # tokens of a micro-batch that keep a device busy: below this, halving it is no gain
SMALLER = "Take a smaller model, or quantize it: mlxlora convert --quantize.bits 4."
FEWEST = 64  # tokens of a row below which there is nothing to learn


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    training: the options with everything filled in; None where nothing fits
    tried:    all forecasts, in their order; the last is the one chosen, or the smallest
    free:     whether there was anything to choose, and not everything set
    """

    training: TrainingConfig | None
    tried: list[Forecast]
    free: bool = True

    @property
    def forecast(self) -> Forecast:
        """Of what was chosen, or of the smallest."""
        return self.tried[-1]

    def why(self) -> str:
        """Why this and nothing faster."""
        if len(self.tried) == 1:
            return "the fastest, and it fits" if self.free else "as set, and it fits"
        before = self.tried[-2]  # what is next in speed
        return f"{described(before)} would take {human_bytes(before.peak)}"

    def flags(self) -> dict[str, Any]:
        """What was chosen, by the names of the options."""
        chosen = self.training
        assert chosen is not None
        found: dict[str, Any] = {"checkpoint_blocks": chosen.checkpoint_blocks}
        if chosen.tokens_per_batch is None:
            found["batch_size"] = chosen.batch_size or ROWS
        else:
            found["tokens_per_batch"] = chosen.tokens_per_batch
        if chosen.accumulate > 1:
            found["accumulate"] = chosen.accumulate
        if chosen.loss_chunk is not None:
            found["loss_chunk"] = chosen.loss_chunk
        return found

    def kept(self, asked: TrainingConfig) -> dict[str, int]:
        """What was chosen that a run must keep to its end: the order of its samples hangs on it."""
        if self.training is None or asked.batch_size is not None or asked.tokens_per_batch is not None:
            return {}
        return {
            "batch_size": self.training.batching(SamplesConfig()).batch_size,
            "accumulate": self.training.accumulate,
        }

    def notices(self, asked: TrainingConfig, limit: int) -> list[str]:
        """What a person should know of it: that a step is made of smaller parts than they may think."""
        now = self.training
        if now is None or now.accumulate == asked.accumulate:
            return []
        return [
            f"{ROWS} samples at once do not fit into {human_bytes(limit)}: each step takes them in "
            f"{now.accumulate // asked.accumulate} parts, as --training.batch_size {now.batch_size} "
            f"--training.accumulate {now.accumulate} does"
        ]


@dataclass(frozen=True)
class Prepared:
    """A network made ready to be trained, and what is to be expected of that."""

    engine: Engine
    optimizer: Optimizer
    forecaster: Forecaster
    choice: Choice


def prepare(
    network: nn.Module,
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    objective: Objective,
    training: TrainingConfig,
    shapes_of: ShapesOf,
    *,
    vocabulary: int,
    limit: int,
    room: int | None = None,
) -> Prepared:
    """Engine and optimizer for a network with its adapter in place, set to what was chosen to fit into `limit`.

    shapes_of: see `shapes`
    room:      what may be used here to find that out, where `limit` is that of another machine
    Raises UnsupportedError where weights and moments alone do not fit here. Close the engine when done.
    """
    refuse_hopeless(network, optimizer, limit if room is None else room)
    moments = Optimizer(optimizer, 1)
    moments.init(flat(network.trainable_parameters()))
    made = Engine(network, replace(engine, checkpoint_blocks="none" if training.blocks == "none" else "auto"))
    try:
        forecaster = Forecaster(made, moments, objective, vocabulary, limit if room is None else room)
        return Prepared(made, moments, forecaster, choose(forecaster, training, shapes_of, limit))
    except BaseException:
        made.close()
        raise


def described(forecast: Forecast) -> str:
    """The settings of a forecast in words."""
    batch = f"batches of {forecast.shape.rows} × {forecast.shape.length:,} tokens"
    chunk = f", loss_chunk {forecast.loss_chunk}" if forecast.loss_chunk else ""
    return f"checkpoint_blocks {forecast.checkpoint_blocks}, {batch}{chunk}"


def settings(training: TrainingConfig, grades: Sequence[CheckpointBlocks]) -> Iterator[TrainingConfig]:
    """The options with what they leave open filled in, fastest first. grades: what may be kept of each block"""
    free = training.batch_size is None and training.tokens_per_batch is None
    for grade in grades if training.blocks == "auto" else (training.blocks,):
        rows = ROWS
        while True:
            filled = replace(training, checkpoint_blocks=grade)
            yield replace(filled, batch_size=rows, accumulate=training.accumulate * (ROWS // rows)) if free else filled
            if not free or rows == 1:
                break
            rows //= 2


def shapes(
    splits: DataSplits, samples: SamplesConfig, training: TrainingConfig, unpadded: bool
) -> tuple[Shape, Shape | None]:
    """The largest batch to learn from, and the largest to validate on, where padding is left out or not."""
    batching = training.batching(samples)
    held_out = None if splits.valid is None else largest(splits.valid, batching, unpadded=unpadded, shuffle=False)
    return largest(splits.train, batching, unpadded=unpadded, seed=training.seed), held_out


def choose(forecaster: Forecaster, training: TrainingConfig, shapes_of: ShapesOf, limit: int) -> Choice:
    """The fastest settings that fit into `limit`. The engine is left set to them.

    shapes_of: see `shapes`
    """
    tried: list[Forecast] = []
    open_ = list(settings(training, forecaster.engine.grades))
    free = len(open_) > 1
    for setting in open_:
        shape, held_out = shapes_of(setting, forecaster.engine.leaves_out_padding)
        if tried and shape.tokens < FILLS and setting.checkpoint_blocks != open_[-1].checkpoint_blocks:
            continue
        for chunk in _chunks(setting, shape, forecaster.vocabulary):
            forecaster.engine.use(setting.blocks, chunk)
            found = forecaster.forecast(shape, setting.accumulate, held_out)
            tried.append(found)
            if found.peak <= limit:
                chosen = replace(setting, loss_chunk=chunk or None)
                if (training.blocks, setting.blocks) == ("auto", "inputs") and forecaster.engine.learning_blocks > 1:
                    chosen = _keep_more(forecaster, chosen, training, shapes_of, limit, tried)
                return Choice(chosen, tried, free)
            if not found.by_loss:
                break  # fewer logits at a time would change nothing
    return Choice(None, tried, free)


def _keep_more(
    forecaster: Forecaster,
    fits: TrainingConfig,
    training: TrainingConfig,
    shapes_of: ShapesOf,
    limit: int,
    tried: list[Forecast],
) -> TrainingConfig:
    """What `fits` by the inputs of its blocks, or the same or a smaller batch with the products of as many upper blocks
    as there is room for. What is looked at goes to `tried`: last what is returned, before it what is next in speed."""
    unpadded = forecaster.engine.leaves_out_padding

    def forecast(setting: TrainingConfig) -> Forecast:
        shape, held_out = shapes_of(setting, unpadded)
        forecaster.engine.use(setting.blocks, setting.loss_chunk or 0)
        return forecaster.forecast(shape, setting.accumulate, held_out)

    def share(setting: TrainingConfig) -> float:
        """How much of what the products of all blocks take there is room for, as far as that grows block by block."""
        low, high = (forecast(replace(setting, checkpoint_blocks=grade)).peak for grade in ("inputs", "products"))
        return (limit - low) / max(high - low, 1)

    smaller = [
        replace(one, loss_chunk=fits.loss_chunk)
        for one in settings(training, ["inputs"])
        if one.accumulate > fits.accumulate and shapes_of(one, unpadded)[0].tokens >= FILLS
    ]
    best = max([fits, *smaller], key=share)
    known: dict[int, Forecast] = {}
    blocks = forecaster.engine.learning_blocks

    def keeping(kept: int) -> TrainingConfig:
        return replace(best, checkpoint_blocks=kept if kept < blocks else "products")

    def too_much(kept: int) -> bool:
        known[kept] = forecast(keeping(kept))
        return known[kept].peak > limit

    kept = min(int(1 + share(best) * (blocks - 1)), blocks)
    while kept > 1 and too_much(kept):
        kept -= 1
    while 1 <= kept < blocks and kept + 1 not in known and not too_much(kept + 1):
        kept += 1
    if kept <= 1:
        forecaster.engine.use(fits.blocks, fits.loss_chunk or 0)
        return fits
    before = known.get(kept + 1) or next(one for one in reversed(tried) if one.peak > limit)
    tried += [before, forecast(keeping(kept))]
    return keeping(kept)


def _chunks(setting: TrainingConfig, shape: Shape, vocabulary: int) -> list[int]:
    if setting.loss_chunk is not None:
        return [setting.loss_chunk]
    usual = chunk_length(shape.targets, vocabulary)
    return [0, *(usual // by for by in (4, 16) if usual // by >= 4)]


def refuse_hopeless(network: nn.Module, optimizer: OptimizerConfig, limit: int) -> None:
    """Raise UnsupportedError where weights and moments alone are too large. Loads and allocates nothing."""
    state = build(optimizer)
    state.init(flat(network.trainable_parameters()))
    weights, moments = bytes_of(network.parameters()), bytes_of(state.state)
    if weights + moments > limit:
        raise UnsupportedError(
            f"This run will not fit: weights take {human_bytes(weights)} and the optimizer's moments "
            f"{human_bytes(moments)}, and the limit is {human_bytes(limit)}. {SMALLER}"
        )


def refusal(forecaster: Forecaster, choice: Choice, training: TrainingConfig, limit: int) -> UnsupportedError:
    """The error of a run that does not fit, with what would."""
    needed = choice.forecast.peak
    return UnsupportedError(
        f"This run will not fit: it needs about {human_bytes(needed)}, and the limit is {human_bytes(limit)}. "
        f"{advice(forecaster, choice.forecast, training, limit)} `mlxlora plan` with the same options shows what else "
        "would."
    )


def advice(forecaster: Forecaster, smallest: Forecast, training: TrainingConfig, limit: int) -> str:
    """What would make a run fit that does not: less at once, shorter rows, or a smaller model."""
    if training.blocks not in ("auto", "inputs"):
        return "Take --training.checkpoint_blocks inputs, or leave it open."
    one = smallest.shape.row(smallest.shape.length)
    if smallest.shape.rows > 1 and forecaster.forecast(one, 2).peak <= limit:
        if training.tokens_per_batch is not None:
            return f"One row at a time would: --training.tokens_per_batch {one.length}."
        times = (training.batch_size or ROWS) * training.accumulate
        return f"One row at a time would: --training.batch_size 1 --training.accumulate {times}."
    most = forecaster.most_tokens(one, limit)
    if most >= FEWEST:
        return f"Rows of {most:,} tokens would: --samples.max_length {most} --training.batch_size 1."
    resident = human_bytes(forecaster.resident)
    return f"What lies in memory between two steps takes {resident}. {SMALLER}"
