"""A stand-in for a trainer that does nothing but save: killed, it goes on from its last checkpoint.

    python -m tests.faults.saver RUN STEPS MEGABYTES

Every weight is a function of the one before it, so a state that was restored wrong shows in the last adapter.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlxlora.files import save_safetensors
from mlxlora.training.checkpoint import TrainingState
from mlxlora.training.run import RunDirectory


def advance(state: TrainingState) -> TrainingState:
    """One step: a recurrence without fixed points, exact in integers."""
    return TrainingState(
        step=state.step + 1,
        epoch=0,
        position=state.position + 1,
        adapter={name: value * 1664525 + 1013904223 for name, value in state.adapter.items()},
        optimizer={name: value * 22695477 + 1 for name, value in state.optimizer.items()},
        counters={"sum": state.counters["sum"] + state.step},
    )


def write(adapter: dict[str, mx.array], folder: Path) -> None:
    """The adapter of a step."""
    save_safetensors(folder / "adapters.safetensors", adapter)


def main() -> None:
    """Run to the end, saying on stdout when a save begins and ends."""
    path, steps, count = Path(sys.argv[1]), int(sys.argv[2]), int(float(sys.argv[3]) * 1e6) // 12
    with RunDirectory.open(path, identity={"count": count}) as run:
        state = run.latest()
        run.write_config(f"count: {count}\n")
        if state is None:
            empty = {"m": mx.arange(count, dtype=mx.uint32), "v": mx.ones(count, dtype=mx.uint32)}
            state = TrainingState(0, 0, 0, {"a": mx.arange(count, dtype=mx.uint32)}, empty, {"sum": 0})
        while state.step < steps:
            state = advance(state)
            print("saving", state.step, flush=True)
            run.save(
                state,
                adapter_writer=partial(write, state.adapter),
                best=state.step % 3 == 0,
                keep=2,
            )
            print("saved", state.step, flush=True)
        run.finish({"steps": steps})


if __name__ == "__main__":
    main()
