"""What a search is made of: the range test, trials, and successive halving."""

from __future__ import annotations

import math
import random
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlxlora.adapters import AdapterConfig
from mlxlora.data import DataSplits
from mlxlora.errors import ConfigError
from mlxlora.files import read_json
from mlxlora.finetune import learn
from mlxlora.progress import Progress
from mlxlora.reporting.jsonl import read
from mlxlora.reporting.page import smooth
from mlxlora.tokenizer import Tokenizer
from mlxlora.training.events import Control, Event, Step

BELOW_THE_BOTTOM = 10.0  # the rate to try is so many times below the one at which the loss was lowest


@dataclass(frozen=True)
class SearchConfig:
    """What to try, and for how long."""

    learning_rates: list[float] = field(default_factory=list)
    """rates to try; when left out, three around the one that a range test suggests"""
    ranks: list[int] = field(default_factory=lambda: [8, 32])
    """ranks to try; alpha / rank stays what the adapter options say"""
    targets: list[str] = field(default_factory=lambda: ["attention", "all-linear"])
    """targets to try; several names joined by a comma are one choice"""
    trials: int = 12
    """at most this many combinations, drawn at random where there are more"""
    steps: int = 30
    """updates of each trial in the first round"""
    reduction: int = 3
    """each round keeps one in so many trials and trains them so many times longer"""
    rows: int = 4000
    """rows of the data that are looked at, drawn evenly from all of it"""
    validation_rows: int = 100
    """rows to validate on that trials are compared by, spread over all of them"""
    range_steps: int = 100
    """updates of the range test"""
    lowest: float = 1e-6
    """where the range test begins"""
    highest: float = 1e-1
    """where the range test ends"""

    def __post_init__(self) -> None:
        def demand(good: bool, name: str, rule: str) -> None:
            if not good:
                raise ConfigError(f"search.{name} is {getattr(self, name)!r}, but must be {rule}.")

        rates = self.learning_rates
        demand(all(math.isfinite(rate) and 0 < rate <= 10 for rate in rates), "learning_rates", "above 0, at most 10")
        demand(bool(self.ranks) and min(self.ranks) >= 1, "ranks", "one or more whole numbers above 0")
        demand(bool(self.targets) and all(self.targets), "targets", "one or more names")
        demand(len({f"{rate:.2e}" for rate in rates}) == len(rates), "learning_rates", "different in three digits")
        for name in ("ranks", "targets"):
            values = getattr(self, name)
            demand(len(set(values)) == len(values), name, "different from each other")
        for name in ("trials", "steps", "validation_rows"):
            demand(getattr(self, name) >= 1, name, "1 or more")
        demand(self.rows >= 10, "rows", "10 or more")
        demand(self.reduction >= 2, "reduction", "2 or more")
        demand(self.range_steps >= 10, "range_steps", "10 or more")
        demand(0 < self.lowest < self.highest <= 10, "lowest", "above 0 and below search.highest, that at most 10")


@dataclass(frozen=True)
class Trial:
    """One combination of options, and what came of it.

    loss: its lowest validation loss in the last round that it took part in; infinite where it blew up
    """

    learning_rate: float
    rank: int
    targets: str
    round: int = 0
    steps: int = 0
    loss: float | None = None

    @property
    def name(self) -> str:
        """The directory of the trial."""
        safe = "".join(letter if letter.isalnum() or letter in "+-_," else "_" for letter in self.targets)
        return f"lr{self.learning_rate:.2e}-r{self.rank}-{safe}"


def around(rate: float) -> list[float]:
    """Three learning rates, a factor of √10 apart."""
    return [float(f"{rate * 10 ** (place / 2):.2g}") for place in (-1, 0, 1)]


def combinations(rates: Sequence[float], search: SearchConfig) -> list[Trial]:
    """Every combination, or as many as wanted, drawn evenly at random; always the same ones."""
    every = [Trial(rate, rank, target) for rate in rates for rank in search.ranks for target in search.targets]
    return every if len(every) <= search.trials else random.Random(0).sample(every, search.trials)


class Search:
    """A search under way: trains trials that were not trained yet, reads the results of those that were.

    path, tokenizer, splits: what all of them learn, and from what
    base: the options of `finetune` that they share; its `out` is that of the search
    """

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        splits: DataSplits,
        base: dict[str, Any],
        search: SearchConfig,
        control: Control,
        on_progress: Progress | None,
    ) -> None:
        self.path, self.tokenizer, self.splits = path, tokenizer, splits
        self.base, self.search, self.out = base, search, base["out"]
        self.control, self.on_progress = control, on_progress

    @property
    def note(self) -> str:
        """What the options of a trial do not tell."""
        held_out = 0 if self.splits.valid is None else len(self.splits.valid)
        return (
            f"a trial of mlxlora tune: learned from {len(self.splits.train):,} samples and validated on {held_out:,}, "
            f"drawn from the data named here (search.rows {self.search.rows:,}, search.validation_rows "
            f"{self.search.validation_rows:,})"
        )

    def learning_rates(self) -> tuple[float | None, list[tuple[float, float]], list[str]]:
        """(suggested rate, the range test's (rate, loss), notices)."""
        search = self.search
        if search.learning_rates:
            return None, [], []
        test = replace(
            self.base["optimizer"], schedule="range-test", cycles=3, cycle_growth=1.0, learning_rate=search.highest,
            min_learning_rate=search.lowest, warmup_steps=0, warmup_ratio=None,
        )  # fmt: skip
        self.train(self.out / "range", {"optimizer": test}, search.range_steps, "range test")
        points = [
            (event["learning_rate"], event["loss"])
            for event in read(self.out / "range" / "metrics.jsonl")
            if event["event"] == "step" and event["loss"] is not None
        ]
        rate = suggestion(points)
        if rate is not None or self.control.stopping:
            return rate, points, []
        fallback = self.base["optimizer"].learning_rate
        return None, points, [f"the range test's loss never fell: trying around {fallback:.1e} instead"]

    def halve(self, trials: list[Trial]) -> list[Trial]:
        """All trials, the best first: those of later rounds before those that did not get there."""
        out: list[Trial] = []
        steps, number = self.search.steps, 1
        while True:
            done: list[Trial] = []
            for place, trial in enumerate(trials):
                if self.control.stopping:
                    return [*done, *trials[place:], *out]
                found = self.train(
                    self.out / f"round-{number}" / trial.name, self.options(trial), steps,
                    f"round {number}: {len(trials)} trials", place, len(trials),
                )  # fmt: skip
                done.append(replace(trial, round=number, steps=steps, loss=found))
            done.sort(key=lambda trial: math.inf if trial.loss is None else trial.loss)
            keep = len(done) // self.search.reduction
            if keep < 2 and (number > 1 or keep < 1 or len(done) <= self.search.reduction):
                return [*done, *out]
            out = [*done[keep:], *out]
            trials, steps, number = done[:keep], steps * self.search.reduction, number + 1

    def train(
        self, run: Path, options: dict[str, Any], steps: int, what: str, place: int = 0, of: int = 1
    ) -> float | None:
        """The lowest validation loss after any step of a trial, number `place` of `of`; None where it was stopped."""
        record = run / "run.json"
        if record.exists() and (stored := read_json(record)).get("finished"):
            return loss_of(stored["summary"]["best_loss"])

        def watch(event: Event) -> None:
            if isinstance(event, Step) and self.on_progress:
                self.on_progress(what, place * steps + event.step, of * steps)

        training = replace(
            self.base["training"], epochs=None, steps=steps, validate_every=steps, save_every=steps, sample_every=0,
            patience=None, target_loss=None, max_minutes=None, skip_nonfinite=steps, keep=1,
        )  # fmt: skip
        run.parent.mkdir(parents=True, exist_ok=True)
        result = learn(
            self.path, self.tokenizer, self.splits, self.base | options | {"training": training, "out": run},
            on_event=watch, control=self.control, note=self.note,
        )  # fmt: skip
        return None if result.reason == "stopped" else loss_of(result.best_loss)

    def options(self, trial: Trial) -> dict[str, Any]:
        """The options of `finetune` that this trial is about."""
        adapter: AdapterConfig = self.base["adapter"]
        return {
            "adapter": replace(
                adapter, rank=trial.rank, alpha=adapter.alpha / adapter.rank * trial.rank,
                targets=trial.targets.split(","),
            ),
            "optimizer": replace(
                self.base["optimizer"], learning_rate=trial.learning_rate,
                min_learning_rate=min(self.base["optimizer"].min_learning_rate, trial.learning_rate),
            ),
        }  # fmt: skip

    def flags(self, trial: Trial) -> str:
        """The same as flags of `train`."""
        adapter = self.options(trial)["adapter"]
        return (
            f"--optimizer.learning_rate {trial.learning_rate:g} --adapter.rank {adapter.rank} "
            f"--adapter.alpha {adapter.alpha:g} --adapter.targets {' '.join(map(shlex.quote, adapter.targets))}"
        )


def loss_of(value: float | None) -> float:
    """A validation loss as something to sort by."""
    return math.inf if value is None or not math.isfinite(value) else value


def suggestion(points: Sequence[tuple[float, float]]) -> float | None:
    """The rate of a range test to train with: well below the one where the smoothed loss was lowest (Smith 2017).

    None where the loss did not fall.
    """
    smoothed = [(rate, loss) for rate, loss in smooth(list(points)) if loss is not None]
    if not smoothed:
        return None
    bottom, lowest = min(smoothed, key=lambda point: point[1])
    if not lowest < smoothed[0][1] * 0.99:
        return None
    return float(f"{max(bottom / BELOW_THE_BOTTOM, smoothed[0][0]):.2g}")
