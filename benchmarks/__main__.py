"""Measure a training step against mlx-lm and PyTorch + PEFT: `python -m benchmarks --only chat,4k --markdown FILE`."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.arena import DTYPES, Result, compete
from benchmarks.scenarios import SCENARIOS
from benchmarks.table import header, rows


def main() -> int:
    """Measure, and print one table; the files hold what is measured so far."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default=",".join(SCENARIOS), help="names of scenarios, separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--hidden", type=int, default=0, help="another width of the models")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--read", type=Path, nargs="+", help="measure nothing: the table of what --json wrote before")
    parser.add_argument(
        "--pictures", type=Path, help="write memory against length and vocabulary as PNG to this folder"
    )
    given = parser.parse_args()
    names = [name for name in given.only.split(",") if name]
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        print(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}", file=sys.stderr)
        return 2
    measured: dict[str, list[Result]] = {}
    if given.read:
        measured = _read(given.read)
        names = [name for name in names if name in measured]
    lines = header()
    print("\n".join(lines if given.read else [_said(given.dtype), "", *lines]), flush=True)
    for name in names:
        scenario = SCENARIOS[name].smaller(given.hidden) if given.hidden else SCENARIOS[name]
        if name not in measured:
            measured[name] = compete(scenario, given.repeats, given.dtype)
        made = rows(scenario, measured[name])
        print("\n".join(made), flush=True)
        lines += made
        if given.json and not given.read:  # after each scenario, for the next may take the machine with it
            plain = {name: [asdict(result) for result in results] for name, results in measured.items()}
            found = {"machine": _machine(given.dtype), "scenarios": plain}
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


def _said(dtype: str) -> str:
    return ", ".join(f"{key} {value}" for key, value in _machine(dtype).items())


def _read(files: Iterable[Path]) -> dict[str, list[Result]]:
    """What several runs found; of a scenario that was measured in more than one, the last."""
    measured = {}
    for file in files:
        for name, results in json.loads(file.read_text())["scenarios"].items():
            known = [{key: value for key, value in result.items() if value is not None} for result in results]
            measured[name] = [Result(**result) for result in known]
    return measured


def _sayable(value: Any) -> Any:
    """With null for what was not measured: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _sayable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_sayable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
