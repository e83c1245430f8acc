"""Pages: one HTML file each, which opens offline, in light and dark, on a phone too.

The charts are drawn by uPlot (MIT), which travels inside the file. Nothing is loaded from anywhere: the page's own
content security policy forbids it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

POINTS = 2000  # of one curve; longer ones are thinned out evenly
SMOOTHING = 0.2  # weight of the newest value in a smoothed curve


def render(template: str, charts: Sequence[dict[str, Any]], **values: Any) -> str:
    """The HTML of a template in `assets/`, which extends `page.html.jinja`, with charts made by `chart`."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from markupsafe import Markup

    assets = resources.files("mlxlora.reporting") / "assets"

    def read(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    environment = ImmutableSandboxedEnvironment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined, loader=jinja2.FunctionLoader(read)
    )
    return environment.get_template(template).render(
        charts=charts,
        charts_json=Markup(json.dumps(charts, allow_nan=False).replace("<", "\\u003c")),
        uplot_css=Markup(read("uplot.min.css")),
        uplot_js=Markup(read("uplot.min.js")),
        **values,
    )


def thinned(points: list[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """At most `POINTS` of the points, evenly chosen, the first and the last among them."""
    if len(points) <= POINTS:
        return points
    return [points[round(index * (len(points) - 1) / (POINTS - 1))] for index in range(POINTS)]


def chart(title: str, curves: list[tuple[dict[str, Any], list[tuple[float, Any]]]], **options: Any) -> dict[str, Any]:
    """A chart of curves over their common x: uPlot wants one x array and gaps as null. Nothing to draw: no chart."""
    curves = [(look, thinned(points)) for look, points in curves if any(value is not None for _, value in points)]
    if not curves:
        return {}
    xs = sorted({x for _, points in curves for x, _ in points})
    data: list[list[Any]] = [list(xs)]
    for _, points in curves:
        by_x = dict(points)
        data.append([by_x.get(x) for x in xs])
    series = [{"color": 0, **look} for look, _ in curves]
    return {"title": title, "x_label": "step", "wide": False, "log": False, "zero": False, "x_log": False} | options | {
        "series": series, "data": data,
    }  # fmt: skip


class Smoothing:
    """An exponential moving average that starts at the first value and passes over gaps."""

    def __init__(self) -> None:
        self.level: Any = None

    def take(self, value: Any) -> Any:
        """The average after one more value; None is a gap."""
        if value is not None:
            self.level = value if self.level is None else (1 - SMOOTHING) * self.level + SMOOTHING * value
        return self.level


def smooth(points: list[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """The points of a curve, smoothed."""
    smoothing = Smoothing()
    return [(x, smoothing.take(value)) for x, value in points]
