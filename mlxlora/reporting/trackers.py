"""Experiment trackers behind one option: TensorBoard, wandb, swanlab, trackio. Each is a function of events."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mlxlora.errors import ConfigError, nearest
from mlxlora.reporting.jsonl import record
from mlxlora.training.events import Event, Finished, Validation

Tracker: TypeAlias = Callable[[Event], None]
Maker: TypeAlias = Callable[[Path, dict[str, Any]], Tracker]

STEP_FIELDS = ("loss", "learning_rate", "grad_norm", "epoch", "tokens", "tokens_per_second", "peak_memory")


def scalars(event: Event) -> dict[str, float]:
    """What of an event is a curve: `train/loss`, `validation/loss`, …"""
    values = record(event)
    if values["event"] == "step":
        found = {f"train/{name}": values[name] for name in STEP_FIELDS}
    elif values["event"] == "validation":
        found = {"validation/loss": values["loss"]}
    else:
        found = {}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def tensorboard(run: Path, config: dict[str, Any]) -> Tracker:
    """Event files in RUN/tensorboard."""
    writer = load("tensorboard.summary", "tensorboard").Writer(str(run / "tensorboard"))

    def track(event: Event) -> None:
        for name, value in scalars(event).items():
            writer.add_scalar(name, value, event.step)
        if isinstance(event, Validation | Finished):
            writer.flush()

    return track


def logger(package: str) -> Maker:
    """wandb, swanlab and trackio speak the same three words: init, log, finish."""

    def make(run: Path, config: dict[str, Any]) -> Tracker:
        module = load(package, package)
        module.init(project="mlxlora", name=run.name, config=config)

        def track(event: Event) -> None:
            if found := scalars(event):
                module.log(found, step=event.step)
            if isinstance(event, Finished):
                module.finish()

        return track

    return make


TRACKERS: dict[str, Maker] = {
    "tensorboard": tensorboard,
    "wandb": logger("wandb"),
    "swanlab": logger("swanlab"),
    "trackio": logger("trackio"),
}


def load(module: str, package: str) -> Any:
    """Import a tracker's module. Raises ConfigError that names its extra where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"report_to {package} needs a package: pip install 'mlxlora[{package}]'") from None


def check(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that is unknown or not installed, before a run begins."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(
                f"report_to: there is no tracker '{name}'.{nearest(name, list(TRACKERS))} "
                f"There are: {', '.join(TRACKERS)}."
            )
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to {name} needs a package: pip install 'mlxlora[{name}]'")


def trackers(names: Sequence[str], run: Path, config: dict[str, Any]) -> list[Tracker]:
    """The trackers of those names, begun."""
    check(names)
    return [TRACKERS[name](run, config) for name in names]
