"""What data and training verbs did, as views."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mlxlora.engine import Engine
from mlxlora.parameters import bytes_of, flat
from mlxlora.plan import Room
from mlxlora.reporting.watch import FinetuneResult
from mlxlora.training.events import Checkpoint, Control, Data, Event, Notice, Samples, Started, Step, Validation
from mlxlora.training.forecast import Forecast, Forecaster
from mlxlora.training.loop import Trainer
from tests.options.calls import Call, Stop, Views
from tests.options.place import Place, listed, tensors


def train(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """A whole run."""
    events: list[Event] = []
    rested: list[float] = []
    patch.setattr("mlxlora.training.pace.Pace._wait", lambda self, seconds, stopping: rested.append(seconds))
    waited: list[int] = []
    report = Trainer.report

    def counted(trainer: Trainer) -> Iterator[Event]:
        waited.extend([len(trainer.pending)] * bool(trainer.pending))
        yield from report(trainer)

    patch.setattr(Trainer, "report", counted)
    patch.setattr("mlxlora.reporting.watch.report_of", lambda *_: None)  # a page that takes longer than the run
    result: FinetuneResult = function(**arguments, on_event=events.append, control=Control())
    steps = [event for event in events if isinstance(event, Step)]
    run = arguments["out"]
    return {
        "weights": tensors(run / "adapter" / "adapters.safetensors"),
        "losses": [event.loss for event in steps if event.step == 2],
        "rates": [event.learning_rate for event in steps if event.step == 3],
        "norms": [event.grad_norm for event in steps if event.step == 1],
        "steps": [event.step for event in steps][-1],
        "reported": waited,
        "validated": [event.step for event in events if isinstance(event, Validation)],
        "saved": [event.step for event in events if isinstance(event, Checkpoint)],
        "kept": len(listed(run / "checkpoints")),
        "answers": [event.step for event in events if isinstance(event, Samples)],
        "notices": [event.message for event in events if isinstance(event, Notice)],
        "learns from": [event for event in events if isinstance(event, Data)],
        "limit": [event.memory_limit for event in events if isinstance(event, Started)],
        "reason": result.reason,
        "rests": bool(rested),
        "trackers": any("tensorboard" in name or "tfevents" in name for name in listed(run)),
    }


def trains_by(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """Which blocks the engine recomputes."""
    asked: list[Any] = []

    def use(engine: Engine, *settings: Any) -> None:
        asked.append(settings)
        raise Stop

    patch.setattr(Engine, "use", use)
    with pytest.raises(Stop):
        function(**arguments, control=Control())
    return {"asked": asked}


def goes_on(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """A run upon a run that was stopped after two steps with another learning rate."""
    control = Control()
    begun = arguments | {"overwrite": False, "accept_changes": None}
    begun["optimizer"] = type(begun["optimizer"])(learning_rate=0.02)

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            control.stop()

    function(**begun, on_event=stop, control=control)
    events: list[Event] = []
    function(**arguments, on_event=events.append, control=Control())
    return {"began at": [event.step for event in events if isinstance(event, Started)]}


def plan(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """The plan, over forecasts that are sums instead of probes."""
    asked: list[Any] = []
    optimizers: list[Any] = []
    update_needs = sys.modules["mlxlora.training.forecast"].update_needs

    def updating(config: Any, parameters: Any) -> Any:
        optimizers.append(config)
        return update_needs(config, parameters)

    def forecast(self: Forecaster, shape: Any, accumulate: int = 1, validation: Any = None) -> Forecast:
        weights = flat(self.engine.network.trainable_parameters())
        size, config = bytes_of(weights), self.engine.config
        asked.append((config.checkpoint_blocks, config.loss_chunk, accumulate, weights.keys(), size, asdict(shape)))
        return Forecast(
            config.checkpoint_blocks, config.loss_chunk, accumulate, shape,
            10**6, size, 0, 10**6, 0, 0, 0, 1.0, 1.0, False, 0.0,
        )  # fmt: skip

    patch.setattr(Forecaster, "forecast", forecast)
    patch.setattr(sys.modules["mlxlora.training.forecast"], "update_needs", updating)
    found = function(**arguments)
    asked.append(optimizers)
    return {
        "asked": asked, "steps": found.steps, "tokens": found.tokens, "limit": found.limit, "machine": found.machine,
        "data": (found.rows, found.length),
    }  # fmt: skip


def tune(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """The trials of a search, whose losses come from a formula instead of a run."""
    trials: list[Any] = []

    def learn(path: Path, tokenizer: Any, splits: Any, settings: dict[str, Any], **_: Any) -> Any:
        options = dict(settings)
        out, training = options.pop("out"), options.pop("training")
        options["data"] = (splits.train.fingerprint, splits.valid.fingerprint)
        trials.append((out.relative_to(arguments["out"]), training, options))
        out.mkdir(parents=True)
        rising = "range" in out.name
        (out / "metrics.jsonl").write_text('{"event": "step", "step": 1, "loss": 1.0, "learning_rate": 0.1}\n' * rising)
        loss = abs(options["optimizer"].learning_rate - 1e-3) + options["adapter"].rank
        return type("Result", (), {"reason": "done", "best_loss": loss})

    patch.setattr(sys.modules["mlxlora.trials"], "learn", learn)
    planned: list[Any] = []

    def planner(loaded: Any, splits: Any, **options: Any) -> Any:
        planned.append((splits.train.fingerprint, options))
        return Room(100, 10)

    patch.setattr(sys.modules["mlxlora.tune"], "room", planner)
    function(**arguments)
    return {"trials": [(str(path), training, options) for path, training, options in trials], "plan": planned}


def check(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """What `data check` tells."""
    found = function(**arguments)
    samples = arguments["samples"]
    return {
        "format": found.formats, "template": found.template, "validation": found.validation, "tokens": found.lengths,
        "samples": found.samples, "learned": found.trained_tokens, "steps": found.steps,
        "lost": (found.truncated, found.dropped, found.short), "shown": len(found.shown),
        "picked": [one.origin for one in found.shown],
        "text": [tuple(piece.text for piece in one.pieces) for one in found.shown][:1],
        "page": found.html is not None and found.html.is_file(),
        "cached": bool(samples.cache and listed(samples.cache)),
        "objective": any(finding.kind == "objective" for finding in found.findings),
    }  # fmt: skip


def convert_data(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """What `data convert` writes."""
    function(**arguments)
    return {"written": arguments["out"].read_text()}
