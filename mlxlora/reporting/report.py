"""The report of one or several runs: one HTML file that opens offline, in light and dark, on a phone too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mlxlora.commands import command
from mlxlora.errors import RunError
from mlxlora.files import human_bytes, read_json, read_yaml, refuse_no_page, write_whole
from mlxlora.reporting.clock import clock
from mlxlora.reporting.foretold import foretold
from mlxlora.reporting.history import History
from mlxlora.reporting.page import chart, render
from mlxlora.reporting.said import said
from mlxlora.training.events import Started

PAGE = "report.html"


@dataclass(frozen=True)
class ReportResult:
    """Where the report is."""

    report: Path
    runs: list[Path]
    model: str
    """what the first of them began with"""

    def __str__(self) -> str:
        heldout = command("compare", model=self.model, adapter=self.runs[0], data="HELDOUT")
        return f"wrote {self.report}. Open it in a browser.\n\nnext: {heldout}"


@dataclass(frozen=True)
class Run:
    """A run directory, read."""

    name: str
    path: Path
    config: dict[str, Any]
    identity: dict[str, Any]
    history: History


def report(runs: list[Path], *, out: Path | None = None) -> ReportResult:
    """Write the report of a run, or of several side by side.

    Args:
        runs: run directories
        out: the HTML file; default RUN/report.html for one run, report.html for several

    Raises RunError for a directory that holds no run.
    """
    if out is not None:
        refuse_no_page(out)
    found = [read_run(Path(path)) for path in runs]
    place = out or (found[0].path / PAGE if len(found) == 1 else Path(PAGE))
    write_whole(place, page(found))
    return ReportResult(place, [run.path for run in found], str(found[0].config.get("model", "MODEL")))


def report_of(path: Path, history: History) -> None:
    """Write RUN/report.html of a run whose events are known."""
    write_whole(path / PAGE, page([read_run(path, history)]))


def read_run(path: Path, history: History | None = None) -> Run:
    """Everything that the report tells of one run. `history`: its events, where they need not be read."""
    if not path.exists():
        raise RunError(f"{path} does not exist. Name a run directory, which `mlxlora train --out` makes.")
    missing = [name for name in ("config.yaml", "run.json", "metrics.jsonl") if not (path / name).is_file()]
    if missing:
        raise RunError(
            f"{path} is no run directory: it has no {' and no '.join(missing)}. Name the one that `mlxlora train --out`"
            " made."
        )
    config = read_yaml(path / "config.yaml")
    return Run(
        name=path.name,
        path=path,
        config=config if isinstance(config, dict) else {},
        identity=read_json(path / "run.json")["identity"],
        history=history or History.of(path / "metrics.jsonl"),
    )


def page(runs: Sequence[Run]) -> str:
    """The HTML of the report."""
    return render(
        "report.html.jinja",
        [chart for make in CHARTS if (chart := make(runs))],
        title=" · ".join(run.name for run in runs),
        subtitle=subtitle(runs),
        runs=[describe(run) for run in runs],
        facts=rows([facts(run) for run in runs]),
        settings=settings(runs),
    )


def subtitle(runs: Sequence[Run]) -> str:
    """Which models the runs began with."""
    models = sorted({str(run.config.get("model", "?")) for run in runs})
    return f"fine-tuned with mlxlora on {', '.join(models)}"


def describe(run: Run) -> dict[str, Any]:
    """What the page shows of one run outside the charts and the tables."""
    here = {"model": run.config.get("model", "MODEL"), "adapter": run.path}
    return {
        "name": run.name,
        "cards": cards(run),
        "notices": run.history.notices,
        "said": said(run.history.looks),
        "commands": f"{command('chat', **here)}\n{command('fuse', **here, out=f'{run.name}-fused')}",
    }


def cards(run: Run) -> list[dict[str, str]]:
    """The few numbers that a run comes to."""
    step, history = run.history.step, run.history
    made = []
    if history.baseline is not None:
        made.append(("validation loss before", f"{history.baseline:.4f}"))
    if history.best is not None:
        made.append(("validation loss, best", f"{history.best[1]:.4f}"))
    if not made and step and step.get("loss") is not None:
        made.append(("training loss, last", f"{step['loss']:.4f}"))
    if step:
        made += [
            ("steps", f"{step['step']:,} of {step['steps']:,}"),
            ("epochs", f"{step['epoch']:.2f}"),
            ("tokens learned", f"{step['tokens']:,}"),
            ("time", clock(step["elapsed"])),
            ("peak memory", human_bytes(history.peak)),
        ]
    made.append(("state", str(history.finished.get("reason", "running or interrupted"))))
    return [{"label": label, "value": value} for label, value in made]


# ---- charts -----------------------------------------------------------------------------------------------------


def losses(runs: Sequence[Run]) -> dict[str, Any]:
    """The chart of training and validation loss."""
    curves: list[tuple[dict[str, Any], list[tuple[float, Any]]]] = []
    for number, run in enumerate(runs):
        many = len(runs) > 1
        name = f"{run.name} " if many else ""
        if not many:
            curves.append(({"label": "each step", "color": 0, "faint": True}, run.history.curves["loss"].all()))
        # one run: a colour for each curve; several: a colour for each run, the same as in the other charts
        smoothed = {"label": f"{name}training, smoothed", "color": number}
        curves.append((smoothed, run.history.curves["smoothed"].all()))
        dashed = {"label": f"{name}validation", "color": number if many else 1, "dashed": many, "points": True}
        curves.append((dashed, run.history.validations.all()))
        if run.history.best is not None:
            best = {"label": f"{name}best", "color": number if many else 4, "points": True, "dots": many}
            curves.append((best, [run.history.best]))
    return chart("Loss (nats per token)", curves, wide=True)


def of_steps(title: str, field: str, **options: Any) -> Callable[[Sequence[Run]], dict[str, Any]]:
    """A chart of one field of the step events."""

    def make(runs: Sequence[Run]) -> dict[str, Any]:
        curves = [
            ({"label": run.name, "color": number}, run.history.curves[field].all()) for number, run in enumerate(runs)
        ]
        scale = options.get("divide", 1)
        scaled = [
            (look, [(x, None if value is None else value / scale) for x, value in points]) for look, points in curves
        ]
        return chart(title, scaled, **{key: value for key, value in options.items() if key != "divide"})

    return make


def memory(runs: Sequence[Run]) -> dict[str, Any]:
    """The chart of peak memory, in a unit that suits it."""
    most = max((run.history.peak for run in runs), default=0)
    unit, size = ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)
    return of_steps(f"Peak memory ({unit})", "peak_memory", zero=True, divide=size)(runs)


def lengths(runs: Sequence[Run]) -> dict[str, Any]:
    """The chart of how long the samples are."""
    curves: list[tuple[dict[str, Any], list[tuple[float, Any]]]] = []
    width = 0.0
    for number, run in enumerate(runs):
        if data := run.history.data:
            edges = data["histogram_edges"]
            width = edges[1] - edges[0] if len(edges) > 1 else 1
            points = [(edge + width / 2, count) for edge, count in zip(edges, data["histogram_counts"], strict=False)]
            curves.append(({"label": run.name, "color": number, "bars": True}, points))
    return chart("Samples by length in tokens", curves, x_label="tokens", zero=True, bar_width=width)


CHARTS: list[Callable[[Sequence[Run]], dict[str, Any]]] = [
    losses,
    of_steps("Learning rate", "learning_rate", zero=True),
    of_steps("Gradient norm, before clipping", "grad_norm", log=True),
    of_steps("Throughput (tokens per second)", "processed_per_second", zero=True),
    memory,
    lengths,
]


# ---- tables -----------------------------------------------------------------------------------------------------


def facts(run: Run) -> dict[str, Any]:
    """What a run learned from and on what, by name."""
    data, started, step = run.history.data, run.history.started, run.history.step
    found: dict[str, Any] = {
        "model": run.config.get("model"),
        "data": ", ".join(run.config.get("data") or ["rows given in Python"]),
    }
    if data:
        found |= {
            "samples": f"{data['samples']:,} to learn from, {data['validation_samples']:,} for validation",
            "tokens": f"{data['tokens']:,}, of which {data['trained_tokens']:,} are learned",
            "shortest and longest sample": f"{data['shortest']:,} and {data['longest']:,} tokens",
        }
    if started:
        share = 100 * started["trainable_parameters"] / max(started["total_parameters"], 1)
        found["parameters"] = f"{started['trainable_parameters']:,} of {started['total_parameters']:,} ({share:.2f} %)"
        if text := foretold(begun(started)):
            found["foretold"] = text
    if step:
        found["measured"] = f"peak {human_bytes(run.history.peak)}, {clock(step['elapsed'])} for {step['step']:,} steps"
    for name in ("model", "tokenizer", "data", "validation data"):
        if run.identity.get(name):
            found[f"fingerprint of the {name}"] = str(run.identity[name])[:16]
    return found


def begun(first: dict[str, Any]) -> Started:
    """The event with which the run, or its first part, began."""
    return Started(**{field.name: first[field.name] for field in fields(Started) if field.name in first})


def rows(tables: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tables side by side: a row for each name, a cell for each table."""
    names = list(dict.fromkeys(name for table in tables for name in table))
    return [{"name": name, "cells": [table.get(name, "") for table in tables]} for name in names]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of options by dotted names."""
    if isinstance(tree, dict) and tree:
        return {key: value for name, part in tree.items() for key, value in flat(part, f"{prefix}{name}.").items()}
    return {prefix[:-1]: "default" if tree is None else tree}


def settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All settings of one run; of several, those that are not the same everywhere."""
    table = rows([flat(run.config) for run in runs])
    return table if len(runs) == 1 else [row for row in table if len({str(cell) for cell in row["cells"]}) > 1]
