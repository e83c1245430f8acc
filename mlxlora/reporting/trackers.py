"""Experiment trackers behind one option: TensorBoard, wandb, swanlab, trackio. Each takes events, and is closed."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from mlxlora.errors import ConfigError, nearest
from mlxlora.reporting.jsonl import record
from mlxlora.training.events import Event, Validation


class Tracker(Protocol):
    """What follows a run and is told how it ended."""

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        ...

    def close(self, error: BaseException | None) -> None:
        """The run is over; `error` is what broke it off, None where it ended as it should."""
        ...


Maker: TypeAlias = Callable[[Path, dict[str, Any]], Tracker]

STEP_FIELDS = (
    "loss", "learning_rate", "grad_norm", "epoch", "tokens", "tokens_per_second", "processed_per_second", "peak_memory",
)  # fmt: skip


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


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        self.writer = load("tensorboard.summary", "tensorboard").Writer(str(run / "tensorboard"))

    def __call__(self, event: Event) -> None:
        for name, value in scalars(event).items():
            self.writer.add_scalar(name, value, event.step)
        if isinstance(event, Validation):
            self.writer.flush()

    def close(self, error: BaseException | None) -> None:
        self.writer.close()


class Logger:
    """wandb, swanlab and trackio speak the same three words: init, log, finish.

    failed: what `finish` is told of a run that was broken off
    """

    def __init__(self, package: str, failed: Callable[[BaseException], dict[str, Any]], run: Path, config: Any) -> None:
        self.module = load(package, package)
        self.failed = failed
        self.module.init(project="mlxlora", name=run.name, config=config)

    def __call__(self, event: Event) -> None:
        if found := scalars(event):
            self.module.log(found, step=event.step)

    def close(self, error: BaseException | None) -> None:
        self.module.finish(**(self.failed(error) if error is not None else {}))


TRACKERS: dict[str, Maker] = {
    "tensorboard": TensorBoard,
    "wandb": partial(Logger, "wandb", lambda error: {"exit_code": 1}),
    "swanlab": partial(Logger, "swanlab", lambda error: {"state": "crashed", "error": str(error) or repr(error)}),
    "trackio": partial(Logger, "trackio", lambda error: {}),  # knows no state
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
