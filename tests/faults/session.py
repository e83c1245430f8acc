"""A small run of the whole pipeline in a process of its own, quickly: forked from a server that has imported it all."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# what a calm and a killed run must agree on, event by event; the rest of a line is time and memory
TOLD = (
    "event",
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "samples",
    "best_loss",
    "best",
    "applied",
)


def rows(path: Path, count: int = 24) -> Path:
    """Conversations of many lengths, as JSONL."""
    lines = []
    for number in range(count):
        turns = [
            {"role": "user", "content": f"What is {number} and {number * 7 % 11}?"},
            {"role": "assistant", "content": f"It is {number * 3}. " * (1 + number * 5 % 6)},
        ]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))
    return path


def settings(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `finetune` from flags such as {"training.steps": 12}."""
    from mlxlora.adapters import AdapterConfig
    from mlxlora.data import SamplesConfig
    from mlxlora.training.config import TrainingConfig
    from mlxlora.training.optimizer import OptimizerConfig

    groups: dict[str, dict[str, Any]] = {"samples": {}, "adapter": {}, "optimizer": {}, "training": {}}
    for name, value in options.items():
        group, _, key = name.partition(".")
        groups[group][key] = value
    return {
        "samples": SamplesConfig(**{"max_length": 96, **groups["samples"]}),
        "adapter": AdapterConfig(**{"rank": 4, "alpha": 8.0, **groups["adapter"]}),
        "optimizer": OptimizerConfig(**groups["optimizer"]),
        "training": TrainingConfig(**groups["training"]),
    }


def run(model: Path, data: Path, out: Path, options: dict[str, Any], **more: Any) -> None:
    """Train, saying nothing, as a script would."""
    from mlxlora.finetune import finetune

    finetune(str(model), [str(data)], out, **settings(options), **more)


def flags(model: Path, data: Path, out: Path, options: dict[str, Any]) -> list[str]:
    """The same run as words of the command line."""
    words = ["train", "--model", str(model), "--data", str(data), "--out", str(out)]
    for name, value in ({"samples.max_length": 96, "adapter.rank": 4, "adapter.alpha": 8.0} | options).items():
        words += [f"--{name}", str(value)]
    return words


def command(words: list[str], said: Path, ignored: Sequence[signal.Signals] = ()) -> None:
    """`mlxlora WORDS`, with what it says in the file `said`, begun with some signals `ignored`."""
    import os

    from mlxlora.cli import command

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the tests themselves may ignore some
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.argv[1:] = words
    sys.exit(command())


def start(model: Path, data: Path, out: Path, options: dict[str, Any]) -> BaseProcess:
    """Begin a session in a process of its own."""
    return begin(run, model, data, out, options)


def begin(function: Any, *arguments: Any) -> BaseProcess:
    """Begin a function of this module in a process of its own."""
    kind = "forkserver" if sys.platform == "linux" else "spawn"  # forking after import is no good on a Mac
    context: Any = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(["tests.faults.preload"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def steps(out: Path) -> int:
    """How many steps have been reported so far."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"event": "step"') if path.exists() else 0


# of a run that is stopped on its way
STOPPED = {"training.steps": 6, "training.save_every": 2, "training.batch_size": 2, "samples.validation_split": 0.0}


def stopped(folder: Path) -> Path:
    """`folder` with a model, data and a run that was stopped after step 4."""
    from mlxlora.training.events import Control, Event, Step
    from tests import tiny

    tiny.model_directory(folder / "model", "qwen3")
    rows(folder / "data.jsonl")
    control = Control()

    def hear(event: Event) -> None:
        if isinstance(event, Step) and event.step == 4:
            control.stop()

    run(folder / "model", folder / "data.jsonl", folder / "run", STOPPED, control=control, on_event=hear)
    return folder


def told(out: Path) -> list[dict[str, Any]]:
    """The events of metrics.jsonl that must be the same in every history of a run."""
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: event.get(name) for name in TOLD} for event in events if event["event"] in ("step", "validation")]
