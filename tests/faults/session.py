"""A small run of the whole pipeline in a process of its own, quickly: forked from a server that has imported it all."""

from __future__ import annotations

import json
import multiprocessing
import sys
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


def run(model: Path, data: Path, out: Path, options: dict[str, Any]) -> None:
    """Train; said nothing, as a script would."""
    import mlx.core as mx

    from mlxlora.finetune import finetune

    mx.set_default_device(mx.cpu)  # the bytes of a GPU's sums may differ from one time to the next
    finetune(str(model), [str(data)], out, **settings(options))


def start(model: Path, data: Path, out: Path, options: dict[str, Any]) -> BaseProcess:
    """Begin a session in a process of its own."""
    kind = "forkserver" if sys.platform == "linux" else "spawn"  # forking after import is no good on a Mac
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(["tests.faults.preload"])
    process = context.Process(target=run, args=(model, data, out, options))
    process.start()
    return process


def told(out: Path) -> list[dict[str, Any]]:
    """The events of metrics.jsonl that must be the same in every history of a run."""
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: event.get(name) for name in TOLD} for event in events if event["event"] in ("step", "validation")]
