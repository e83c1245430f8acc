"""Is it better? Base and tuned side by side, row by row, with a verdict that knows what chance can do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora.adapters.files import parse_spec
from mlxlora.commands import command
from mlxlora.data import Batch, BatchConfig, Dataset, SamplesConfig, collate, plan_epoch
from mlxlora.data import load as load_data
from mlxlora.engine import Engine, EngineConfig
from mlxlora.errors import ConfigError
from mlxlora.files import refuse_existing, write_whole
from mlxlora.generate import SamplingConfig, complete
from mlxlora.harness import differences, measure, refuse_missing
from mlxlora.metrics import Difference, compare_scores, metric
from mlxlora.model import LanguageModel, load
from mlxlora.objectives.sft import sft
from mlxlora.progress import Progress
from mlxlora.prompts import sample_prompt
from mlxlora.reporting.said import shortened


@dataclass(frozen=True)
class Row:
    """One held-out row, and what became of it.

    losses and answers are by candidate: `base`, then one for each scale
    """

    origin: str
    prompt: str
    expected: str
    tokens: int
    losses: dict[str, float]
    answers: dict[str, str]
    scores: dict[str, dict[str, float]]
    """by metric, then by candidate"""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    differences: by candidate (`tuned`, or `scale 0.5` and so on), then by metric (`loss` is one of them)
    best:        the candidate that did best: by the first metric that was asked for, else by loss
    factor:      on the scales of all adapters, of that candidate
    harness:     by task and metric of lm-evaluation-harness: the adapters as given against the base
    """

    model: str
    adapter: list[str]
    data: str
    rows: int
    differences: dict[str, dict[str, Difference]]
    best: str
    factor: float
    verdict: str
    samples: list[Row]
    """rows where base and best answer differently, at most 5"""
    harness: dict[str, Difference] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows of {self.data}: {self.model} beside {' and '.join(self.adapter)}"]
        header = f"  {'':<12}{'metric':<14}{'base':>9}{'tuned':>9}{'difference':>12}   95 % interval         verdict"
        lines.append(header)
        for candidate, metrics in self.differences.items():
            for name, found in metrics.items():
                interval = f"[{found.low:+.4f}, {found.high:+.4f}]"
                lines.append(
                    f"  {candidate:<12}{name:<14}{found.base:>9.4f}{found.tuned:>9.4f}{found.difference:>+12.4f}"
                    f"   {interval:<22}{found.verdict}"
                )
        for row in self.samples:
            lines += ["", f"  {row.origin}: {shortened(row.prompt)}", f"    expected  {shortened(row.expected)}"]
            lines += [f"    {name:<9} {shortened(answer)}" for name, answer in row.answers.items()]
        if self.harness:
            lines += ["", "general abilities (lm-evaluation-harness):"]
        for name, found in self.harness.items():
            lines.append(
                f"  {name:<26}{found.base:>9.4f}{found.tuned:>9.4f}{found.difference:>+12.4f}"
                f"   [{found.low:+.4f}, {found.high:+.4f}]   {found.verdict}"
            )
        lines += ["", f"verdict: {self.verdict}", "", f"next: {self.next()}"]
        return "\n".join(lines)

    def next(self) -> str:
        """The command that comes next: fuse what is better, as strong as it was best; look closer at what is not: at
        how the runs went, or, where an adapter is none, at what the model says with it."""
        given = [parse_spec(one) for one in self.adapter]
        if not self.verdict.startswith("better"):
            if all((path / "metrics.jsonl").is_file() for path, _ in given):
                return command("report", *(path for path, _ in given))
            return command("chat", model=self.model, adapter=self.adapter)
        scales = [(path, scale * self.factor) for path, scale in given]
        adapters = [str(path) if scale == 1 else f"{path}={scale:g}" for path, scale in scales]
        return command("fuse", model=self.model, adapter=adapters, out="DIR")


def compare(
    model: str,
    adapter: list[str],
    data: Path,
    *,
    metrics: list[str] | None = None,
    scales: list[float] | None = None,
    samples: SamplesConfig = SamplesConfig(),  # noqa: B008
    sampling: SamplingConfig = SamplingConfig(max_tokens=256),  # noqa: B008
    max_rows: int = 200,
    harness: list[str] | None = None,
    harness_limit: int | None = None,
    out: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
) -> Comparison:
    """Compare a model with itself tuned, on rows that it was not trained on.

    Args:
        model: a model directory, or a model on the hub
        adapter: `PATH` or `PATH=SCALE`, any number, together on the model; a run directory will do
        data: held-out rows; of a directory, the test rows, else the validation rows, else the training rows
        metrics: of generated answers: exact, contains, regex:…, json, json-equal, json-schema:FILE, number:TOLERANCE,
            rouge-l, MODULE:FUNCTION; without any, only losses are compared
        scales: factors on the scales of all adapters to try; the best is named
        samples: how rows become samples
        sampling: how answers are generated
        max_rows: at most this many rows, spread over the data
        harness: tasks of lm-evaluation-harness to measure too, without and with the adapters: did it forget? Names, or
            YAML files; data sets come from the hub
        harness_limit: at most so many questions of each task
        out: write every row with losses, answers and scores there, as JSONL
        revision: branch, tag or commit on the hub
        trust_remote_code: allow the model to run Python code of its own
    """
    wanted = {name: metric(name) for name in metrics or ()}
    factors = check(scales, max_rows, out)
    if harness_limit is not None and (harness_limit < 1 or not harness):
        rule = "1 or more" if harness else "given with --harness"
        raise ConfigError(f"harness_limit is {harness_limit}, but must be {rule}.")
    if harness:
        refuse_missing()
    loaded = load(model, revision=revision, trust_remote_code=trust_remote_code)
    for spec in adapter:
        loaded.adapters.add_spec(spec)
    dataset, place = held_out(loaded, data, samples, on_progress)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(max_rows, len(dataset))).astype(int)).tolist()
    given = dict(loaded.adapters.scales)
    candidates = {"tuned" if len(factors) == 1 else f"scale {f:g}": f for f in factors}
    rows = [blank(loaded, dataset, index) for index in chosen]
    for name, factor in {"base": 0.0, **candidates}.items():
        loaded.adapters.set_scales({one: scale * factor for one, scale in given.items()})
        for row, loss in zip(rows, row_losses(loaded, dataset, chosen), strict=True):
            row.losses[name] = loss
        if wanted:
            answer_rows(loaded, dataset, chosen, rows, name, sampling, on_progress)
    loaded.adapters.set_scales(given)
    for row in rows:
        for title, score in wanted.items():
            row.scores[title] = {name: score(row.answers[name], row.expected) for name in row.answers}
    if out is not None:
        write_whole(out, "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows))
    found = judge(model, adapter, place, rows, candidates, list(wanted))
    return replace(found, harness=abilities(loaded, harness, harness_limit, on_progress)) if harness else found


def abilities(
    model: LanguageModel, tasks: list[str], limit: int | None, on_progress: Progress | None
) -> dict[str, Difference]:
    """Tasks of the harness without and with the adapters at their given scales."""
    given, scores = dict(model.adapters.scales), []
    for number, factor in enumerate((0.0, 1.0)):
        if on_progress is not None:
            on_progress("lm-evaluation-harness", number, 2)
        model.adapters.set_scales({name: scale * factor for name, scale in given.items()})
        scores.append(measure(model, tasks, limit=limit))
    return differences(*scores)


def check(scales: list[float] | None, max_rows: int, out: Path | None) -> list[float]:
    """The scales to compare, each once. Raises ConfigError for options that cannot be right."""
    if max_rows < 2:
        raise ConfigError(f"max_rows is {max_rows}, but must be 2 or more: one row says nothing of chance.")
    factors = list(dict.fromkeys(scales or [1.0]))
    if any(not 0 < abs(factor) <= 100 for factor in factors):
        raise ConfigError(
            f"scales are {factors}, but must be numbers up to 100, and not 0: that is the base, which stands beside "
            "all of them anyway."
        )
    if out is not None:
        refuse_existing(out)
    return factors


def held_out(
    model: LanguageModel, data: Path, samples: SamplesConfig, on_progress: Progress | None
) -> tuple[Dataset, str]:
    """(rows to compare on, where they come from): the first of test, validation and training that has two."""
    whole = replace(samples, validation_split=0.0, packing=False)
    splits = load_data(data, model.tokenizer, whole, vocabulary_size=model.vocabulary, on_progress=on_progress)
    for name, part in (("test", splits.test), ("valid", splits.valid), ("train", splits.train)):
        if part is not None and len(part) >= 2:
            return part, f"{data} ({name})"
    raise ConfigError(f"{data} has fewer than 2 rows: too few to compare anything.")


def blank(model: LanguageModel, dataset: Dataset, index: int) -> Row:
    """The row of one sample, with nothing measured yet."""
    sample = dataset[index]
    prompt, expected = sample_prompt(model.tokenizer, sample)
    return Row(dataset.origin(index), prompt.text, expected, int((sample.weights > 0).sum()), {}, {}, {})


def row_losses(model: LanguageModel, dataset: Dataset, chosen: Sequence[int]) -> Iterator[float]:
    """The mean loss of each chosen row, in their order."""
    lengths = dataset.lengths[list(chosen)]
    plan = plan_epoch(lengths, BatchConfig(batch_size=8), seed=0, epoch=0, shuffle=False)
    found = np.zeros(len(chosen))
    engine = Engine(model.network, EngineConfig(checkpoint_blocks="none"))  # there is no way back to prepare

    def objective(scores: Any, batch: Batch) -> Any:
        total, count, _ = sft(scores, batch)
        return total, count, {"log_probs": scores.token_log_probs(batch)}

    try:
        for planned in plan:
            rows = tuple(tuple(chosen[index] for index in row) for row in planned.rows)
            batch = collate(dataset, replace(planned, rows=rows), pad_id=model.tokenizer.pad_id)
            _, _, values = engine.evaluate(objective, batch)
            weights = np.array(batch.weights)
            weighted = weights * -np.array(values["log_probs"].astype(mx.float32))
            row_of = np.array(batch.loss_positions) // batch.tokens.shape[1]
            for place, row in enumerate(planned.rows):
                own = (row_of == place) & (weights > 0)
                found[row[0]] = weighted[own].sum() / weights[own].sum()
    finally:
        engine.close()
    yield from found.tolist()


def answer_rows(
    model: LanguageModel,
    dataset: Dataset,
    chosen: Sequence[int],
    rows: Sequence[Row],
    name: str,
    sampling: SamplingConfig,
    on_progress: Progress | None,
) -> None:
    """Let the model answer every row; the answers are kept in the rows, under `name`."""
    for number, (index, row) in enumerate(zip(chosen, rows, strict=True), 1):
        prompt, _ = sample_prompt(model.tokenizer, dataset[index])
        row.answers[name] = complete(model, prompt, sampling).text.strip()
        if on_progress is not None:
            on_progress(f"answering: {name}", number, len(rows))


def judge(
    model: str,
    adapter: list[str],
    data: str,
    rows: Sequence[Row],
    candidates: Mapping[str, float],
    metrics: Sequence[str],
) -> Comparison:
    """Differences of every candidate (with its factor) to the base, and which candidate is best."""
    tokens = [float(row.tokens) for row in rows]
    base = [row.losses["base"] for row in rows]
    differences: dict[str, dict[str, Difference]] = {}
    for name in candidates:
        tuned = [row.losses[name] for row in rows]
        found = {"loss": compare_scores(base, tuned, lower_is_better=True, weights=tokens)}
        for title in metrics:
            one, other = ([row.scores[title][which] for row in rows] for which in ("base", name))
            found[title] = compare_scores(one, other)
        differences[name] = found
    if metrics:
        best = max(candidates, key=lambda name: (differences[name][metrics[0]].tuned, -differences[name]["loss"].tuned))
    else:
        best = min(candidates, key=lambda name: differences[name]["loss"].tuned)
    leading = metrics[0] if metrics else "loss"
    verdict = f"{differences[best][leading].verdict} by {leading}"
    if len(candidates) > 1:
        verdict += f"; best with {best}"
    shown = [row for row in rows if row.answers and row.answers["base"] != row.answers[best]][:5]
    return Comparison(model, list(adapter), data, len(rows), differences, best, candidates[best], verdict, shown)
