"""Will it fit? Predict memory, speed and duration of a run before it starts, and choose what makes it fit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlxlora import hub
from mlxlora.adapters import AdapterConfig, inject, remove
from mlxlora.data import SamplesConfig
from mlxlora.data import load as load_data
from mlxlora.data.feed import Feed
from mlxlora.engine import EngineConfig
from mlxlora.errors import ConfigError
from mlxlora.files import human_bytes
from mlxlora.memory import limit_of
from mlxlora.model import load
from mlxlora.objectives.sft import sft
from mlxlora.parameters import flat
from mlxlora.progress import Progress
from mlxlora.reporting.clock import clock
from mlxlora.training.config import TrainingConfig
from mlxlora.training.forecast import GRADES, Forecast, advice, forecast, largest
from mlxlora.training.loop import count_steps
from mlxlora.training.optimizer import Optimizer, OptimizerConfig

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    limit:     bytes that it may take
    chosen:    the fastest way of checkpointing that fits, or None where none does
    forecasts: one for each way
    table:     by context length: the peak under each way, one row of that length a batch
    """

    model: str
    data: list[str]
    machine: str
    limit: int
    rows: int
    length: int
    steps: int
    tokens: int
    forecasts: list[Forecast]
    chosen: str | None
    seconds: float | None
    """None for another machine"""
    tokens_per_second: float | None
    most_tokens: int
    """about how many tokens a batch may have under the smallest way"""
    table: dict[int, dict[str, int]]

    def __str__(self) -> str:
        lines = [f"{self.model} on {self.machine}: at most {human_bytes(self.limit)}"]
        lines.append(f"largest batch: {self.rows} × {self.length:,} = {self.rows * self.length:,} tokens")
        lines.append(
            f"  {'checkpoint_blocks':<20}{'weights':>10}{'adapter':>10}{'moments':>10}{'step':>10}{'peak':>10}"
        )
        for found in self.forecasts:
            sizes = (found.weights, found.adapter, found.moments, max(found.step, found.update), found.peak)
            verdict = "fits" if found.peak <= self.limit else "does not fit"
            cells = "".join(f"{human_bytes(size):>10}" for size in sizes)
            lines.append(f"  {found.checkpoint_blocks:<20}{cells}  {verdict}")
        lines.append("longer rows, one a batch (by proportion):")
        names = [found.checkpoint_blocks for found in self.forecasts]
        lines.append(f"  {'context':<12}" + "".join(f"{name:>22}" for name in names))
        for context, peaks in self.table.items():
            row = [f"{human_bytes(peaks[name])} {'fits' if peaks[name] <= self.limit else 'no'}" for name in names]
            lines.append(f"  {context:<12,}" + "".join(f"{cell:>22}" for cell in row))
        if self.chosen is None:
            lines.append(f"It does not fit. {advice(self.forecasts[-1], self.limit)}")
        else:
            why = "the fastest that fits" if self.chosen == names[0] else f"{names[0]} does not fit"
            lines.append(f"chosen: --training.checkpoint_blocks {self.chosen} ({why})")
        if self.seconds is not None and self.tokens_per_second is not None:
            lines.append(
                f"{self.steps:,} steps over {self.tokens:,} tokens: about {clock(self.seconds)} "
                f"at {self.tokens_per_second:,.0f} tokens a second"
            )
        if self.chosen is not None:
            lines += ["", f"next: mlxlora train --model {self.model} --data {' '.join(self.data)} --out RUN"]
        return "\n".join(lines)


def plan(
    model: str,
    data: list[str],
    *,
    samples: SamplesConfig = SamplesConfig(),  # noqa: B008
    adapter: AdapterConfig = AdapterConfig(),  # noqa: B008
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
    training: TrainingConfig = TrainingConfig(),  # noqa: B008
    memory_limit: str | None = None,
    for_: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
) -> Plan:
    """Predict what `train` with the same options would need: memory, time, and what fits.

    Args:
        model: a model directory, or a model on the hub
        data: as for train
        memory_limit: what MLX may take, such as 12GB; default a safe share of what the machine recommends
        for_: another Mac, such as "M2 16GB"; memory only
        revision: branch, tag or commit on the hub
        trust_remote_code: allow the model to run Python code of its own
    """
    machine, limit = ("this machine", limit_of(memory_limit)) if for_ is None else other_machine(for_)
    loaded = load(hub.find(model, revision=revision), trust_remote_code=trust_remote_code)
    splits = load_data(data, loaded.tokenizer, samples, seed=training.seed, on_progress=on_progress)
    batching = training.batching(samples)
    feed = Feed(splits.train, batching, training.seed)
    steps = count_steps(feed, training)
    shape = largest(splits.train, batching, seed=training.seed)
    inject(loaded.network, adapter, seed=training.seed)
    try:
        chosen_optimizer = Optimizer(optimizer, steps)
        chosen_optimizer.init(flat(loaded.network.trainable_parameters()))
        found = []
        grades = GRADES if training.blocks == "auto" else (training.blocks,)
        for number, grade in enumerate(grades):
            if on_progress:
                on_progress("probing", number, len(grades))
            found.append(
                forecast(
                    loaded.network,
                    EngineConfig(checkpoint_blocks=grade),
                    chosen_optimizer,
                    sft,
                    shape,
                    vocabulary=loaded.vocabulary,
                    accumulate=training.accumulate,
                )
            )
        if on_progress:
            on_progress("probing", len(grades), len(grades))
    finally:
        remove(loaded.network)
    fitting = next((one for one in found if one.peak <= limit), None)
    epoch = feed.plan(0)
    per_epoch = sum(int(splits.train.lengths[list(batch.samples)].sum()) for batch in epoch)
    batches = len(epoch)
    tokens = round(per_epoch * steps * training.accumulate / max(batches, 1))
    speed = None if fitting is None else shape.tokens * training.accumulate / fitting.seconds
    padded = per_epoch and epoch.tokens / per_epoch
    seconds = None if speed is None or for_ is not None else tokens * padded / speed
    return Plan(
        model=model,
        data=list(data),
        machine=machine,
        limit=limit,
        rows=shape.rows,
        length=shape.length,
        steps=steps,
        tokens=tokens,
        forecasts=found,
        chosen=None if fitting is None else fitting.checkpoint_blocks,
        seconds=seconds,
        tokens_per_second=None if seconds is None or speed is None else speed / padded,
        most_tokens=found[-1].most_tokens(limit),
        table={context: {one.checkpoint_blocks: one.at(context) for one in found} for context in CONTEXTS},
    )


def other_machine(text: str) -> tuple[str, int]:
    """(name, limit) of a Mac: macOS lends the GPU two thirds of up to 36 GB, and three quarters of more."""
    found = re.search(r"(\d+)\s*gi?b\b", text, re.IGNORECASE)
    if not found or not 4 <= int(found[1]) <= 1024:
        raise ConfigError(f"--for is '{text}'. Say the chip and its memory, such as \"M2 16GB\".")
    memory = int(found[1]) * 2**30
    return text, int(0.9 * memory * (2 / 3 if memory <= 36 * 2**30 else 3 / 4))
