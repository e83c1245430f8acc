"""`mlxlora data check`: what a data set holds, what of it is learned, and what is suspicious about it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora import hub
from mlxlora.commands import command
from mlxlora.data.batches import EpochPlan, plan_epoch
from mlxlora.data.config import BatchConfig, SamplesConfig
from mlxlora.data.counts import Counts
from mlxlora.data.dataset import Dataset
from mlxlora.data.findings import PLACES, Finding, Findings
from mlxlora.data.load import DataSplits, load
from mlxlora.data.look import Looker
from mlxlora.data.reader import OTHER_OBJECTIVES
from mlxlora.data.show import Shown, for_page, for_terminal, shown
from mlxlora.errors import ConfigError
from mlxlora.files import plain, refuse_no_page, write_whole
from mlxlora.model import load_tokenizer
from mlxlora.progress import Progress
from mlxlora.tokenizer import Tokenizer

TERMINAL_TOKENS = 300  # of a sample on a terminal
BINS = 12


@dataclass(frozen=True)
class DataCheck:
    """What `mlxlora data check` found.

    samples, tokens, trained_tokens: of the training data
    lengths: shortest, median, 90th percentile and longest sample, in tokens
    histogram: samples by length: (shortest, longest, how many)
    unmasked: rows whose answer could not be located, and which are left out
    truncated, dropped: samples longer than max_length, which are cut or left out
    short: samples with fewer tokens than min_length, which are left out
    rejected: rows whose ending is labelled as bad
    padding, packed_padding: share of a batch that is padding, one sample a row and packed
    steps: optimizer steps of an epoch with this batch size
    findings: warnings
    shown: some samples, token by token
    settings: of `samples`, those that are not the defaults
    revision: of the model on the hub, where one was asked for
    """

    data: tuple[str, ...]
    model: str
    formats: tuple[str, ...]
    template: str
    rows: int
    samples: int
    validation: int
    tokens: int
    trained_tokens: int
    lengths: tuple[int, int, int, int]
    histogram: tuple[tuple[int, int, int], ...]
    unmasked: int
    truncated: int
    dropped: int
    short: int
    rejected: int
    padding: float
    packed_padding: float
    steps: int
    findings: tuple[Finding, ...]
    shown: tuple[Shown, ...]
    settings: dict[str, Any]
    html: Path | None = None
    revision: str | None = None

    def facts(self) -> list[tuple[str, str]]:
        """The figures with their names."""
        share = 100 * self.trained_tokens / max(1, self.tokens)
        shortest, median, ninetieth, longest = self.lengths
        return [
            ("format", ", ".join(self.formats)),
            ("template", self.template),
            ("samples", f"{self.samples:,} to train on, {self.validation:,} for validation ({self.rows:,} rows)"),
            ("tokens", f"{self.tokens:,}, of which {self.trained_tokens:,} are trained ({share:.0f} %)"),
            ("length", f"{shortest:,} to {longest:,} tokens, median {median:,}, 90 % below {ninetieth:,}"),
            ("left out", self._left_out()),
            ("padding", f"{100 * self.padding:.1f} % ({100 * self.packed_padding:.1f} % with --samples.packing)"),
            ("steps", f"{self.steps:,} an epoch"),
        ]

    def _left_out(self) -> str:
        rare = {"labelled as bad": self.rejected, "too short": self.short}
        first = "".join(f"{count:,} {what}, " for what, count in rare.items() if count)
        return f"{first}{self.dropped:,} too long, {self.unmasked:,} without an answer; {self.truncated:,} are cut"

    def __str__(self) -> str:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        lines = [f"{name:<14}{value}" for name, value in self.facts()]
        most = max((count for *_, count in self.histogram), default=1) or 1
        lines += ["", "lengths in tokens"]
        lines += [f"  {low:>6}–{high:<6} {'█' * round(40 * n / most)} {n:,}" for low, high, n in self.histogram]
        for sample in self.shown:
            cut = replace(sample, pieces=sample.pieces[:TERMINAL_TOKENS])
            cut = replace(cut, left_out=sample.left_out + len(sample.pieces) - len(cut.pieces))
            head = f"── {sample.origin}: {sample.tokens:,} tokens, {sample.trained:,} trained"
            lines += ["", head + ("" if colour else " (trained text in ⟦ ⟧)"), for_terminal(cut, colour=colour)]
        lines += ["", f"{len(self.findings)} warning{'s' * (len(self.findings) != 1)}"]
        lines += [f"  ! {finding}" for finding in self.findings]
        if self.html:
            lines.append(f"all of it as a page: {self.html}")
        flags = {"revision": self.revision} if self.revision is not None else {}
        flags |= {f"samples.{name}": _word(value) for name, value in self.settings.items()}
        lines += ["", f"next: {command('train', model=self.model, data=self.data, **flags, out='RUN')}"]
        return "\n".join(lines)


def _word(value: Any) -> str:
    """A setting as one word of a command line, read back as YAML."""
    return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)


def check(
    data: list[str],
    *,
    model: str,
    samples: SamplesConfig = SamplesConfig(),  # noqa: B008 - frozen
    batch_size: int = 4,
    tokens_per_batch: int | None = None,
    show: int = 3,
    html: Path | None = None,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
) -> DataCheck:
    """Look at a data set as training will see it: counts, lengths, every token with its loss, and warnings.

    Args:
        data: files, directories or hub data sets, as for training
        model: the model directory or hub id whose tokenizer and chat template are used
        samples: how rows become samples, as for training
        batch_size: rows of a batch, to estimate padding and steps
        tokens_per_batch: tokens of a batch instead of a number of rows
        show: how many samples are shown token by token
        html: write all of it as a page that opens without a network
        seed: of the validation split
        revision: branch, tag or commit of the model on the hub
        trust_remote_code: allow the tokenizer to run Python code of its own

    Raises DataError with every row that cannot be read (file:line).
    """
    batches = BatchConfig(batch_size=batch_size, tokens_per_batch=tokens_per_batch, max_length=samples.max_length)
    if show < 0:
        raise ConfigError(f"show is {show}, but must be 0 or more.")
    if html is not None:
        refuse_no_page(html)
    tokenizer = load_tokenizer(hub.find(model, revision=revision), trust_remote_code=trust_remote_code)
    config = replace(samples, allow_unusable=True, preference="chosen")
    splits = load(data, tokenizer, config, seed=seed, on_progress=on_progress)
    findings = Findings()
    others = sorted({*splits.formats.values()} & {*OTHER_OBJECTIVES})
    if others and samples.preference == "refuse":
        findings.add("objective", f"the rows are for another objective ({', '.join(others)})")
    _look_at_samples(splits, tokenizer, findings)
    Looker(tokenizer, samples, findings).look(data, on_progress)
    train, counts = splits.train, splits.counts["train"]
    plan = plan_epoch(train.lengths, batches, seed=seed, epoch=0, repeats=train.repeats)
    packed = plan_epoch(train.lengths, replace(batches, packing=True), seed=seed, epoch=0, repeats=train.repeats)
    result = DataCheck(
        data=tuple(str(item) for item in data),
        model=model,
        formats=tuple(sorted(set(splits.formats.values()))),
        template=_template_name(tokenizer, samples),
        rows=counts.rows,
        samples=len(train),
        validation=len(splits.valid) if splits.valid else 0,
        tokens=int(train.lengths.sum()),
        trained_tokens=int(train.trained.sum()),
        lengths=_quantiles(train),
        histogram=_histogram(train),
        unmasked=counts.unlocated,
        truncated=counts.truncated,
        dropped=counts.dropped,
        short=counts.short,
        rejected=counts.rejected,
        padding=_padding(plan, train),
        packed_padding=_padding(packed, train),
        steps=len(packed if samples.packing else plan),
        findings=findings.all,
        settings={name: value for name, value in vars(samples).items() if value != getattr(SamplesConfig(), name)},
        shown=tuple(shown(train[index], tokenizer) for index in _chosen(train, show)),
        html=html,
        revision=revision,
    )
    if html is not None:
        bars = [(f"{low}–{high}", count) for low, high, count in result.histogram]
        title = f"{', '.join(result.data)} with {model}"
        write_whole(html, for_page(title, result.facts(), bars, [str(f) for f in result.findings], result.shown))
    return result


# -- warnings about samples -------------------------------------------------------------------------------------------


def _look_at_samples(splits: DataSplits, tokenizer: Tokenizer, findings: Findings) -> None:
    for counts in splits.counts.values():
        _look_at_counts(counts, findings)
    train, bos = splits.train, tokenizer.bos_id
    twice = np.flatnonzero((train.heads == (-2 if bos is None else bos)).all(axis=1))
    for index in twice[:PLACES]:
        findings.add("double_bos", "a sample begins with two beginning-of-text tokens", train.origin(int(index)))
    findings.raise_count("double_bos", len(twice))
    share = int(train.trained.sum()) / max(1, int(train.lengths.sum()))
    if share < 0.05:
        findings.add("mostly_prompt", f"only {100 * share:.1f} % of the tokens are trained")
    if len(train) < 20:
        findings.add("few", f"there are {len(train)} samples to train on")


def _look_at_counts(counts: Counts, findings: Findings) -> None:
    if counts.unended:
        findings.add("no_end", f"{counts.unended:,} samples have a turn that no token ends", count=counts.unended)
    if counts.dropped_thinking:
        what = f"the template leaves out the reasoning of {counts.dropped_thinking:,} assistant turns"
        findings.add("thinking", what, count=counts.dropped_thinking)
    for problem in counts.cut:
        findings.add("long", "samples are longer than max_length and are cut", problem.where)
    for problem in counts.listed:
        if "max_length" in problem.what:
            findings.add("dropped", "samples are longer than max_length and are left out", problem.where)
        elif "min_length" in problem.what:
            findings.add("short", "samples are shorter than min_length and are left out", problem.where)
        else:
            kind = "untrained" if problem.what == "no token of it is learned" else "unlocated"
            findings.add(kind, problem.what, problem.where)
    for kind, all_of_them in (("long", counts.truncated), ("dropped", counts.dropped), ("short", counts.short)):
        findings.raise_count(kind, all_of_them)


# -- figures ----------------------------------------------------------------------------------------------------------


def _template_name(tokenizer: Tokenizer, config: SamplesConfig) -> str:
    if config.template:
        return config.template
    return "the model's own" if tokenizer.chat_templates else "none (plain text)"


def _padding(plan: EpochPlan, data: Dataset) -> float:
    """The share of an epoch's tokens that is padding."""
    return 1 - int(plan.filled(data.lengths).sum()) / max(1, plan.tokens)


def _quantiles(data: Dataset) -> tuple[int, int, int, int]:
    shortest, median, ninetieth, longest = np.quantile(data.lengths, [0, 0.5, 0.9, 1], method="lower")
    return int(shortest), int(median), int(ninetieth), int(longest)


def _histogram(data: Dataset) -> tuple[tuple[int, int, int], ...]:
    """Samples by length, in steps that are equal or, for a wide range, grow."""
    low, high = data.shortest, data.longest
    edges = np.geomspace(low, high + 1, BINS + 1) if high > 8 * low else np.linspace(low, high + 1, BINS + 1)
    edges = np.unique(edges.round().astype(int))
    counts, _ = np.histogram(data.lengths, edges)
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    return tuple((begin, end - 1, count) for begin, end, count in pairs)


def _chosen(data: Dataset, count: int) -> Iterator[int]:
    """The samples to show: spread over the lengths."""
    order = np.argsort(data.lengths, kind="stable")
    if count >= len(order):
        yield from order.tolist()
    else:
        yield from (int(order[round(place)]) for place in np.linspace(0, len(order) - 1, count + 2)[1:-1].tolist())
