"""Loss and perplexity on data, of a model as it is and with adapters on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import mlx.core as mx

from mlxlora.commands import command
from mlxlora.data import BatchConfig, Dataset, SamplesConfig, collate, plan_epoch
from mlxlora.data import load as load_data
from mlxlora.data.counts import Counts
from mlxlora.engine import Engine, EngineConfig
from mlxlora.errors import ConfigError
from mlxlora.model import LanguageModel, load
from mlxlora.objectives.sft import sft
from mlxlora.parameters import number
from mlxlora.progress import Progress

Split = Literal["auto", "train", "valid", "test"]


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicts the tokens that carry weight.

    loss:       mean over all of them, in nats per token
    perplexity: its exponential
    """

    loss: float
    perplexity: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.4g}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found.

    split:   which part of the data was taken
    samples: how many, and `tokens` of them that carry weight (their sum of weights)
    base:    the model without adapters
    adapted: the model with all of `adapter` on it, or None without any
    notes:   what was computed in a slower way, left out or cut
    """

    model: str
    adapter: tuple[str, ...]
    data: str
    split: str
    samples: int
    tokens: float
    base: Score
    adapted: Score | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = f"{self.samples:,} samples, {self.tokens:,.0f} trained tokens ({self.split} of {self.data})"
        lines = [what, f"  {self.model}: {self.base}"]
        if self.adapted is not None:
            change = self.adapted.loss - self.base.loss
            lines.append(f"  with {' and '.join(self.adapter)}: {self.adapted} ({change:+.4f})")
        if self.adapter:
            after = command("compare", model=self.model, adapter=self.adapter, data=self.data)
        else:
            after = command("train", model=self.model, data="PATH", out="RUN")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), "", f"next: {after}"])


def evaluate(
    model: str,
    data: Path,
    *,
    adapter: list[str] | None = None,
    samples: SamplesConfig = SamplesConfig(),  # noqa: B008 - frozen
    split: Split = "auto",
    tokens_per_batch: int = 4096,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure loss and perplexity on data, without and with adapters.

    The same tokens count as in training. The result does not depend on how samples are put into batches.

    Args:
        model: a model directory, or a name on the hub
        data: a file, or a directory with train, valid and test files
        adapter: `PATH` or `PATH=SCALE`, any number; a run directory will do
        samples: how rows become samples
        split: which file of a directory (auto: test, else valid, else train)
        tokens_per_batch: tokens in one forward pass, padding included; less needs less memory
        revision: branch, tag or commit on the hub
        trust_remote_code: allow the model to run Python files of its own
        on_progress: called with what is being done, how much is done, and how much there is

    Raises:
        DataError: rows that cannot be used
        ModelError, AdapterError: something is wrong with the model or an adapter
    """
    if tokens_per_batch < 8:
        raise ConfigError(f"tokens_per_batch is {tokens_per_batch}; give 8 or more.")
    loaded = load(model, revision=revision, trust_remote_code=trust_remote_code)
    for spec in adapter or ():
        loaded.adapters.add_spec(spec)
    whole = replace(samples, validation_split=0.0, packing=False)
    splits = load_data(data, loaded.tokenizer, whole, vocabulary_size=loaded.vocabulary, on_progress=on_progress)
    parts: dict[str, Dataset | None] = {"test": splits.test, "valid": splits.valid, "train": splits.train}
    name = split if split != "auto" else next(name for name, part in parts.items() if part is not None)
    chosen = parts[name]
    if chosen is None:
        raise ConfigError(f"--split {name}: {data} has no {name} data.")
    scales = dict(loaded.adapters.scales)
    loaded.adapters.set_scales(dict.fromkeys(scales, 0.0))
    base, tokens, notes = score(loaded, chosen, tokens_per_batch=tokens_per_batch, on_progress=on_progress)
    adapted = None
    if scales:
        loaded.adapters.set_scales(scales)
        adapted, _, more = score(loaded, chosen, tokens_per_batch=tokens_per_batch, on_progress=on_progress)
        notes = list(dict.fromkeys([*notes, *more]))
    return Evaluation(
        model=model,
        adapter=tuple(adapter or ()),
        data=str(data),
        split=name,
        samples=len(chosen),
        tokens=tokens,
        base=base,
        adapted=adapted,
        notes=(*notes, *_lost(splits.counts[name])),
    )


def _lost(counts: Counts) -> list[str]:
    """What a figure leaves out."""
    lost = {
        "truncated": counts.truncated,
        "left out as too long": counts.dropped,
        "left out as too short": counts.short,
        "unusable": counts.lost,
    }
    return [f"{count} samples {what}" for what, count in lost.items() if count]


def score(
    model: LanguageModel,
    dataset: Dataset,
    *,
    tokens_per_batch: int = 4096,
    on_progress: Progress | None = None,
) -> tuple[Score, float, list[str]]:
    """Score a loaded model, as it is, on a data set.

    Returns the score, the weight of the tokens that it is a mean over, and what was computed in a slower way.
    """
    longest = int(dataset.lengths.max(initial=1))
    config = BatchConfig(tokens_per_batch=max(tokens_per_batch, longest))
    plan = plan_epoch(dataset.lengths, config, seed=0, epoch=0, shuffle=False)
    engine = Engine(model.network, EngineConfig(checkpoint_blocks="none"))  # there is no way back to prepare
    total, weight = 0.0, 0.0
    try:
        pending: list[tuple[mx.array, mx.array]] = []
        for done, planned in enumerate(plan, 1):
            part, count, _ = engine.evaluate(sft, collate(dataset, planned, pad_id=model.tokenizer.pad_id))
            mx.async_eval(part, count)
            pending.append((part, count))
            if len(pending) > 1:  # one batch runs while the next is put together
                total, weight = _added(pending.pop(0), total, weight)
            if on_progress is not None:
                on_progress("evaluating", done, len(plan))
        for last in pending:
            total, weight = _added(last, total, weight)
        notes = list(engine.notes)
    finally:
        engine.close()
    loss = total / weight if weight else math.nan
    return Score(loss, math.exp(min(loss, 700.0))), weight, notes


def _added(done: tuple[mx.array, mx.array], total: float, weight: float) -> tuple[float, float]:
    """Sums in double precision, so that their order does not show."""
    part, count = done
    return total + number(part), weight + number(count)
