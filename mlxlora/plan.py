"""Will it fit? Predict memory, speed and duration of a run before it starts, and choose what makes it fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlxlora import architecture, hub
from mlxlora.adapters import AdapterConfig, inject, remove
from mlxlora.commands import command
from mlxlora.data import DataSplits, SamplesConfig
from mlxlora.data import load as load_data
from mlxlora.engine import EngineConfig
from mlxlora.files import human_bytes
from mlxlora.finetune import feeds, keep_frozen, refuse_pointless
from mlxlora.macs import MEMORIES, mac, working_set
from mlxlora.memory import SAFE_SHARE, limit_of
from mlxlora.model import LanguageModel, load
from mlxlora.objectives.sft import sft
from mlxlora.progress import Progress
from mlxlora.reporting.clock import clock
from mlxlora.training.choice import Prepared, advice, prepare, shapes
from mlxlora.training.config import TrainingConfig
from mlxlora.training.forecast import Forecast, Forecaster, outlook
from mlxlora.training.optimizer import OptimizerConfig
from mlxlora.training.shapes import Shape
from mlxlora.training.steps import count_steps, count_validations

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
LONG = 4096  # tokens of a row: in longer ones nothing is cut up otherwise, so memory goes on as it grew
PATIENCE = 20.0  # seconds of a step beyond which longer rows are told from shorter ones


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    limit:    bytes that it may take
    chosen:   the settings of the fastest way that fits, or None where none does
    why:      why that one; what would fit, where none does
    tried:    the forecasts, in the order in which they were looked at
    samples:  how many there are to learn from
    table:    by context length: the peak under each way of checkpointing, one row of that length a batch
    notes:    what has to be computed in a slower or larger way for this model, and why
    """

    model: str
    data: list[str]
    machine: str
    limit: int
    rows: int
    length: int
    samples: int
    steps: int
    tokens: int
    tried: list[Forecast]
    chosen: dict[str, Any] | None
    why: str
    seconds: float | None
    """None for another machine"""
    tokens_per_second: float | None
    most_tokens: int
    """about how many tokens a row may have under the smallest way"""
    table: dict[int, dict[str, int]]
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"{self.model} on {self.machine}: at most {human_bytes(self.limit)}"]
        lines.append(f"largest batch: {self.rows} × {self.length:,} = {self.rows * self.length:,} tokens")
        heads = ("weights", "adapter", "moments", "step", "peak")
        lines.append(f"  {'keeps':<10}{'batch':<14}{'loss chunk':<12}" + "".join(f"{head:>10}" for head in heads))
        for found in self.tried:
            sizes = (found.weights, found.adapter, found.moments, found.peak - found.resident, found.peak)
            batch = f"{found.shape.rows} × {found.shape.length:,}"
            cells = "".join(f"{human_bytes(size):>10}" for size in sizes)
            verdict = "fits" if found.peak <= self.limit else "does not fit"
            lines.append(
                f"  {found.checkpoint_blocks:<10}{batch:<14}{found.loss_chunk or 'usual':<12}{cells}  {verdict}"
            )
        if self.chosen is None:
            lines.append(f"It does not fit. {self.why}")
        else:
            flags = " ".join(f"--training.{name} {value}" for name, value in self.chosen.items())
            lines.append(f"chosen: {flags} ({self.why})")
        if self.seconds is not None and self.tokens_per_second is not None:
            lines.append(
                f"{self.steps:,} steps over {self.tokens:,} tokens: about {clock(self.seconds)} "
                f"at {self.tokens_per_second:,.0f} tokens a second"
            )
        lines += [f"note: {note}" for note in self.notes]
        lines += self.contexts()
        if self.chosen is not None:
            lines += ["", f"next: {command('train', model=self.model, data=self.data, out='RUN')}"]
        return "\n".join(lines)

    def contexts(self) -> list[str]:
        """The table of what longer rows would need, as lines."""
        names = list(next(iter(self.table.values())))
        lines = ["", "what rows of other lengths need, one a batch:"]
        lines.append(f"  {'context':<10}" + "".join(f"{name:>22}" for name in names) + "  fits a Mac of")
        for context, peaks in self.table.items():
            cells = (f"{human_bytes(peaks[name])} {'fits' if peaks[name] <= self.limit else 'no'}" for name in names)
            least = next((f"{memory} GB" for memory in MEMORIES if min(peaks.values()) <= mac_limit(memory)), "no Mac")
            lines.append(f"  {context:<10,}" + "".join(f"{cell:>22}" for cell in cells) + f"  {least}")
        return lines


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
    refuse_pointless(adapter, optimizer)
    here = limit_of(memory_limit)
    machine, limit = ("this machine", here) if for_ is None else other_machine(for_)
    loaded = load(hub.find(model, revision=revision), trust_remote_code=trust_remote_code)
    splits = load_data(data, loaded.tokenizer, samples, seed=training.seed, on_progress=on_progress)
    if on_progress:
        on_progress("small steps", 0, 0)
    with probed(
        loaded, splits, samples=samples, adapter=adapter, optimizer=optimizer, training=training, limit=limit, here=here
    ) as ready:
        choice, forecaster = ready.choice, ready.forecaster
        fits = choice.training is not None
        told = choice.forecast if fits else choice.tried[0]
        batches, held_out = feeds(splits, samples, choice.training or training)
        steps = count_steps(batches, choice.training or training)
        validations = count_validations(batches, choice.training or training, steps)
        smallest = advice(forecaster, choice.forecast, training, limit) if not fits else ""
        table = contexts(forecaster, training, told.shape)
        most = forecaster.most_tokens(told.shape, limit)
        keep_frozen(ready.engine, batches, choice.training or training, steps)
        expected = outlook(batches, held_out, told, steps, validations, ready.engine.frozen_kept)
        notes = [*architecture.silently_wrong(loaded.config), *ready.engine.notes]
    timed = fits and for_ is None
    return Plan(
        model=model,
        data=list(data),
        machine=machine,
        limit=limit,
        rows=told.shape.rows,
        length=told.shape.length,
        samples=len(splits.train),
        steps=steps,
        tokens=expected.tokens,
        tried=choice.tried,
        chosen=choice.flags() if fits else None,
        why=choice.why() if fits else smallest,
        seconds=expected.seconds if timed else None,
        tokens_per_second=expected.tokens_per_second if timed else None,
        most_tokens=most,
        table=table,
        notes=notes,
    )


@contextlib.contextmanager
def probed(
    loaded: LanguageModel,
    splits: DataSplits,
    *,
    samples: SamplesConfig,
    adapter: AdapterConfig,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    limit: int,
    here: int,
) -> Iterator[Prepared]:
    """A model made ready to be trained, with what was chosen to fit into `limit`; as it was after the block.

    here: what may be used on this machine to find that out
    """
    inject(loaded.network, adapter, seed=training.seed)
    ready: Prepared | None = None
    try:
        ready = prepare(
            loaded.network, EngineConfig(), optimizer, sft, training, partial(shapes, splits, samples),
            vocabulary=loaded.vocabulary, limit=limit, room=here,
        )  # fmt: skip
        yield ready
    finally:
        if ready is not None:
            ready.engine.close()
        remove(loaded.network)


@dataclass(frozen=True)
class Room:
    """How much one batch may hold.

    most_tokens: about how many tokens
    length:      of the longest row
    """

    most_tokens: int
    length: int


def room(loaded: LanguageModel, splits: DataSplits, *, limit: int, **options: Any) -> Room:
    """How large a batch of these samples may be within `limit`, with the options of `probed`."""
    with probed(loaded, splits, limit=limit, here=limit, **options) as ready:
        choice = ready.choice
        told = choice.forecast if choice.training is not None else choice.tried[0]
        return Room(ready.forecaster.most_tokens(told.shape, limit), told.shape.length)


def contexts(forecaster: Forecaster, training: TrainingConfig, shape: Shape) -> dict[int, dict[str, int]]:
    """The peak by context length and way of checkpointing, one row a batch. Leaves the engine set to the smallest."""
    table: dict[int, dict[str, int]] = {length: {} for length in CONTEXTS}
    for kept in forecaster.engine.grades if training.blocks == "auto" else (training.blocks,):
        forecaster.engine.use(kept, training.loss_chunk or 0)
        known: list[Forecast] = []
        for length in CONTEXTS:
            longer = len(known) >= 2 and known[-1].seconds * length / known[-1].shape.length > PATIENCE
            if longer or (known and known[-1].shape.length >= LONG):
                table[length][str(kept)] = forecaster.onward(known, length)
                continue
            known.append(forecaster.forecast(replace(shape.row(length), documents=1)))
            table[length][str(kept)] = known[-1].peak
    return table


def other_machine(text: str) -> tuple[str, int]:
    """(name, limit) of a Mac. Raises ConfigError for one that there is not."""
    name, memory = mac(text)
    return name, mac_limit(memory)


def mac_limit(memory: int) -> int:
    """Bytes that a run may take on a Mac with so many GB: a safe share of what macOS lends the GPU."""
    return int(SAFE_SHARE * working_set(memory))
