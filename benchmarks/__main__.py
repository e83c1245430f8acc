"""Measure a training step against mlx-lm and PyTorch + PEFT: `python -m benchmarks --only chat,4k --markdown FILE`."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.arena import DTYPES, Result, compete
from benchmarks.scenarios import SCENARIOS, Scenario


def main() -> int:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default=",".join(SCENARIOS), help="names of scenarios, separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--hidden", type=int, default=0, help="another width of the models")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument(
        "--pictures", type=Path, help="write memory against length and vocabulary as PNG to this folder"
    )
    given = parser.parse_args()
    names = [name for name in given.only.split(",") if name]
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        print(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}", file=sys.stderr)
        return 2
    lines = [*_header(given.dtype)]
    measured = {}
    print("\n".join(lines), flush=True)
    for name in names:
        scenario = SCENARIOS[name].smaller(given.hidden) if given.hidden else SCENARIOS[name]
        results = compete(scenario, given.repeats, given.dtype)
        measured[name] = [asdict(result) for result in results]
        rows = [_row(scenario, result, results[0]) for result in results]
        print("\n".join(rows), flush=True)
        lines += rows
    if given.json:
        found = {"machine": _machine(given.dtype), "scenarios": measured}
        given.json.write_text(json.dumps(_sayable(found), indent=1, allow_nan=False) + "\n")
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n")
    if given.pictures:
        from benchmarks.pictures import draw

        draw(given.pictures)
    return 0


def _machine(dtype: str) -> dict[str, str]:
    return {
        "device": str(mx.default_device()),
        "processor": platform.processor() or platform.machine(),
        "blas": Path(os.environ.get("LD_PRELOAD", "of the wheel")).name,
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
        "mlx": version("mlx"),
        "dtype": dtype,
    }


def _header(dtype: str) -> list[str]:
    machine = ", ".join(f"{key} {value}" for key, value in _machine(dtype).items())
    return [
        f"{machine}. Speed and memory are ratios to the first row of each scenario, in the same run.",
        "",
        "| scenario | contestant | speed (processor time) | speed (clock) | memory above the weights | of the floor "
        "| loss | Δ loss | Δ gradients |",
        "|---|---|---|---|---|---|---|---|---|",
    ]


def _row(scenario: Scenario, result: Result, first: Result) -> str:
    if result.failure:
        return f"| {scenario.title} | {result.name} | {result.failure} | | | | | | |"
    per_token = first.trained / result.trained if scenario.samples else 1.0
    speed = first.cpu / result.cpu / per_token
    clock = first.wall / result.wall / per_token
    memory = f"{result.memory / 1e6:,.0f} MB (1/{first.memory / result.memory:.1f})"
    return (
        f"| {scenario.title} | {result.name} | {speed:.2f} | {clock:.2f} | {memory} | {result.floor_share:.0%} "
        f"| {_number(result.loss, '.6f')} | {_number(result.loss_error, '.0e')} "
        f"| {_number(result.gradient_error, '.0e')} |"
    )


def _sayable(value: Any) -> Any:
    """With null for what was not measured: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _sayable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_sayable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
