"""The picture of a search: the range test, the trials, and a table of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mlxlora.reporting.page import chart, render, smooth


def search_page(
    model: str, suggested: float | None, range_test: Sequence[tuple[float, float]], trials: Sequence[dict[str, Any]]
) -> str:
    """The HTML of a search.

    range_test: (learning rate, loss) of each step
    trials: learning_rate, rank, targets, round, steps, loss of each trial, the best first
    """
    charts = [found for found in (range_chart(suggested, range_test), trial_chart(trials)) if found]
    return render(
        "search.html.jinja",
        charts,
        title="Search",
        subtitle=f"learning rate, rank and targets for {model}",
        trials=[trial | {"shown": said(trial["loss"])} for trial in trials],
        suggested=suggested,
    )


def said(loss: float | None) -> str:
    """A loss as the table of trials says it."""
    return "not tried" if loss is None else "blew up" if math.isinf(loss) else f"{loss:.4f}"


def range_chart(suggested: float | None, points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Loss over the learning rate, as far as it says something: not beyond twice the loss of the beginning."""
    if not points:
        return {}
    smoothed = [(rate, loss) for rate, loss in smooth(list(points)) if loss is not None]
    ceiling = 2 * smoothed[0][1]
    end = next((rate for rate, loss in smoothed if loss > ceiling), math.inf)
    curves: list[tuple[dict[str, Any], list[tuple[float, Any]]]] = [
        ({"label": "each step", "faint": True}, [(rate, loss) for rate, loss in points if rate < end]),
        ({"label": "smoothed"}, [(rate, loss) for rate, loss in smoothed if rate < end]),
    ]
    if suggested is not None:
        nearest = min(smoothed, key=lambda point: abs(math.log(point[0] / suggested)))
        curves.append(({"label": "suggested", "color": 4, "dots": True}, [nearest]))
    return chart(
        "Range test: loss while the learning rate grows", curves, x_label="learning rate", x_log=True, wide=True
    )


def trial_chart(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Validation loss over the learning rate, a series for each rank and targets; each trial in its last round."""
    kinds = list(dict.fromkeys((trial["rank"], trial["targets"]) for trial in trials))
    curves = []
    for number, (rank, targets) in enumerate(sorted(kinds)):
        points = [
            (trial["learning_rate"], trial["loss"])
            for trial in trials
            if (trial["rank"], trial["targets"]) == (rank, targets)
            and trial["loss"] is not None
            and math.isfinite(trial["loss"])
        ]
        curves.append(({"label": f"rank {rank}, {targets}", "color": number, "dots": True}, sorted(points)))
    return chart("Trials: validation loss", curves, x_label="learning rate", x_log=True, wide=True)
