"""Find a learning rate, a rank and targets on a little of the training: a range test, then successive halving.

Every trial is an ordinary run of `finetune` in its own directory below `--out`, so a search that was interrupted goes
on where it was, and `mlxlora report` shows any of its trials.

    OUT/tune.json           what the search depends on
    OUT/range/              the range test: one run whose learning rate grows by equal factors
    OUT/round-1/NAME/ …     the trials of each round: the best third goes on to the next, with three times the steps
    OUT/tune.html           the picture
    OUT/best.yaml           the best options, for `mlxlora train --config`
"""

from __future__ import annotations

import math
import random
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mlxlora import hub
from mlxlora.adapters import AdapterConfig
from mlxlora.commands import command
from mlxlora.data import SamplesConfig
from mlxlora.data import load as load_data
from mlxlora.errors import ConfigError, Problem, RunError
from mlxlora.files import plain, read_json, refuse_unmakeable, write_json, write_whole
from mlxlora.finetune import finetune
from mlxlora.model import load_tokenizer
from mlxlora.plan import plan
from mlxlora.progress import Progress
from mlxlora.reporting.jsonl import read
from mlxlora.reporting.page import smooth
from mlxlora.reporting.search import search_page
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Control, Event, Step
from mlxlora.training.identity import identify
from mlxlora.training.optimizer import OptimizerConfig

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
        for name in ("trials", "steps"):
            demand(getattr(self, name) >= 1, name, "1 or more")
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


@dataclass(frozen=True)
class TuneResult:
    """What `tune` found.

    suggested:        the learning rate of the range test; None where rates were given, or nothing could be told
    range_test:       (learning rate, loss) of each of its steps
    trials:           every trial, the best first
    most_tokens:      about how many tokens, padding included, a batch may have in the memory limit
    batch_size:       samples of the greatest length in such a batch; never more than there are
    reason:           done, or stopped: the same command goes on
    """

    out: Path
    reason: str
    suggested: float | None
    range_test: list[tuple[float, float]]
    trials: list[Trial]
    flags: str
    most_tokens: int
    batch_size: int
    picture: Path
    notices: list[str]

    def __str__(self) -> str:
        if self.reason == "stopped":
            return "stopped; what was tried is kept, and the same command goes on from here"
        lines = [f"  {'learning rate':<16}{'rank':>5}  {'targets':<18}{'steps':>6}{'validation loss':>17}"]
        for trial in self.trials:
            loss = "blew up" if trial.loss is None or math.isinf(trial.loss) else f"{trial.loss:.4f}"
            lines.append(
                f"  {trial.learning_rate:<16.2e}{trial.rank:>5}  {trial.targets:<18}{trial.steps:>6}{loss:>17}"
            )
        if self.suggested is not None:
            lines.append(f"range test: {self.suggested:.1e} suggested")
        lines += [f"note: {text}" for text in self.notices]
        lines.append(f"memory: batches of up to {self.batch_size:,} samples of the greatest length fit")
        lines.append(f"best: {self.flags}")
        lines.append(f"picture: {self.picture}")
        lines += ["", f"next: {command('train', config=self.out / 'best.yaml', out='RUN')}"]
        return "\n".join(lines)


def tune(
    model: str,
    data: list[str],
    out: Path,
    *,
    search: SearchConfig = SearchConfig(),
    samples: SamplesConfig = SamplesConfig(),  # noqa: B008
    adapter: AdapterConfig = AdapterConfig(),  # noqa: B008
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
    training: TrainingConfig = TrainingConfig(),  # noqa: B008
    memory_limit: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
    control: Control | None = None,
) -> TuneResult:
    """Search for a good learning rate, rank and targets; the same call again goes on with an unfinished search.

    Args:
        model: a model directory, or a model on the hub
        data: as for train; it needs validation rows, by file or by split
        out: a new directory for the trials and the result
        memory_limit: what MLX may take, such as 12GB; default a safe share of what the machine recommends
        revision: branch, tag or commit on the hub
        trust_remote_code: allow the model to run Python code of its own
    """
    out = Path(out)
    control = control or Control()
    base = {
        "model": model, "data": data, "samples": samples, "adapter": adapter, "optimizer": optimizer,
        "training": training, "memory_limit": memory_limit, "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    begin(out, base, search, on_progress)
    needs = plan(
        model, data, samples=samples, adapter=widest(adapter, search), optimizer=optimizer, training=training,
        memory_limit=memory_limit, revision=revision, trust_remote_code=trust_remote_code, on_progress=on_progress,
    )  # fmt: skip
    searching = Search(out, base, search, control, on_progress)
    suggested, points, notices = searching.learning_rates()
    rates = search.learning_rates or around(suggested or optimizer.learning_rate)
    trials = searching.halve(combinations(rates, search))
    best, picture = trials[0], out / "tune.html"
    stopped = control.stopping or best.loss is None
    if len(rates) > 1 and best.learning_rate in (min(rates), max(rates)) and not stopped:
        end = "lowest" if best.learning_rate == min(rates) else "highest"
        beyond = " ".join(f"{rate:g}" for rate in around(best.learning_rate))
        notices.append(f"the best rate is the {end} one tried; look beyond: --search.learning_rates {beyond}")
    if not stopped:
        write_whole(picture, search_page(model, suggested, points, [asdict(trial) for trial in trials]))
        write_whole(out / "best.yaml", yaml.safe_dump(plain(base | searching.options(best)), sort_keys=False))
    return TuneResult(
        out=out,
        reason="stopped" if stopped else "done",
        suggested=suggested,
        range_test=points,
        trials=trials,
        flags=searching.flags(best),
        most_tokens=needs.most_tokens,
        batch_size=min(needs.most_tokens // needs.length, needs.samples),
        picture=picture,
        notices=notices,
    )


def begin(out: Path, base: dict[str, Any], search: SearchConfig, on_progress: Progress | None) -> None:
    """Refuse what cannot be searched, or an `out` of something else; note in `out` what the search depends on."""
    refuse_unmakeable(out)
    path = hub.find(base["model"], revision=base["revision"])
    tokenizer = load_tokenizer(path, trust_remote_code=base["trust_remote_code"])
    splits = load_data(
        base["data"], tokenizer, base["samples"],
        seed=base["training"].seed, on_progress=on_progress,
    )  # fmt: skip
    if splits.valid is None:
        raise ConfigError(
            "tune compares by validation loss. Give --samples.validation, or --samples.validation_split and at least "
            "ten rows."
        )
    searched = {f"search.{name}": value for name, value in plain(search).items()}
    identity = identify(path, tokenizer, splits, base) | searched
    record = out / "tune.json"
    if not record.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(f"{out} exists and holds no search. Choose another --out.")
        out.mkdir(parents=True, exist_ok=True)
        write_json(record, {"format": 1, "identity": identity})
        return
    stored = read_json(record)
    old = stored.get("identity") if isinstance(stored, dict) else None
    if not isinstance(old, dict):
        raise RunError(f"{record} is not what this version of mlxlora writes. Choose another --out.")
    changed = [name for name in sorted({*old, *identity}) if old.get(name) != identity.get(name)]
    if changed:
        raise RunError.of(
            f"{out} holds a search that was begun with other settings. Choose another --out.",
            [Problem(name, f"was {old.get(name)!r}, is now {identity.get(name)!r}") for name in changed],
        )


def widest(adapter: AdapterConfig, search: SearchConfig) -> AdapterConfig:
    """The adapter that needs the most memory of those tried."""
    return replace(
        adapter, rank=max(search.ranks), targets=sorted({t for one in search.targets for t in one.split(",")})
    )


def around(rate: float) -> list[float]:
    """Three learning rates, a factor of √10 apart."""
    return [float(f"{rate * 10 ** (place / 2):.2g}") for place in (-1, 0, 1)]


def combinations(rates: Sequence[float], search: SearchConfig) -> list[Trial]:
    """Every combination, or as many as wanted, drawn evenly at random; always the same ones."""
    every = [Trial(rate, rank, target) for rate in rates for rank in search.ranks for target in search.targets]
    return every if len(every) <= search.trials else random.Random(0).sample(every, search.trials)


class Search:
    """A search under way: trains trials that were not trained yet, reads the results of those that were."""

    def __init__(
        self, out: Path, base: dict[str, Any], search: SearchConfig, control: Control, on_progress: Progress | None
    ) -> None:
        self.out, self.base, self.search = out, base, search
        self.control, self.on_progress = control, on_progress

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
            self.base["training"], epochs=None, steps=steps, validate_every=steps, save_every=steps, sample_every=None,
            patience=None, target_loss=None, max_minutes=None, skip_nonfinite=steps, keep=1,
        )  # fmt: skip
        run.parent.mkdir(parents=True, exist_ok=True)
        result = finetune(
            **(self.base | options | {"training": training}), out=run, on_event=watch, control=self.control
        )
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
