"""What a run needs to go on as if it had never stopped, saved and loaded bit for bit.

A checkpoint is a directory of four files:

    manifest.json          SHA-256 and size of each of the others, the step, and whose run it is; written last
    adapter.safetensors    the trained weights, as the trainer holds them
    optimizer.safetensors  the optimizer's state, flat
    state.json             step, epoch, position in the epoch, counters

Random state needs no place here: the trainer derives it from seed and step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora.errors import FormatError, InputError, Problem
from mlxlora.files import MANIFEST, file_records, load_safetensors, read_json, save_safetensors, write_json, wrong_files
from mlxlora.parameters import bytes_of

FORMAT = 1  # of the directory; another number is refused
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class TrainingState:
    """A run between two steps.

    step:      optimizer steps done
    epoch:     the epoch that the next step belongs to, from 0
    position:  planned batches of that epoch already used
    adapter:   trained weights by parameter path
    optimizer: the optimizer's state as a flat dictionary (scalars as arrays)
    counters:  whatever else the loop counts, as JSON: best loss, tokens seen, seconds elapsed, patience
    """

    step: int
    epoch: int
    position: int
    adapter: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    counters: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes that this state takes in a checkpoint (headers aside)."""
        return bytes_of([self.adapter, self.optimizer])


def write_checkpoint(directory: Path, state: TrainingState, owner: str) -> None:
    """Write `state` into an existing empty directory, the manifest last.

    owner: what identifies the run; `read_checkpoint` compares it
    """
    mx.eval(state.adapter, state.optimizer)
    save_safetensors(directory / "adapter.safetensors", state.adapter)
    save_safetensors(directory / "optimizer.safetensors", state.optimizer)
    progress = {"step": state.step, "epoch": state.epoch, "position": state.position, "counters": state.counters}
    write_json(directory / "state.json", progress)
    write_json(
        directory / MANIFEST,
        {
            "format": FORMAT,
            "kind": "checkpoint",
            "step": state.step,
            "run": owner,
            "files": file_records(directory, FILES),
        },
    )


def read_checkpoint(directory: Path, owner: str) -> TrainingState:
    """The state that `write_checkpoint` wrote, after every file has been compared with the manifest.

    Raises FormatError naming the file when anything is missing, changed, of another format or of another run.
    """
    manifest = _read(directory / MANIFEST)
    problems = wrong_files(directory, manifest.get("files"), FILES)
    if manifest.get("format") != FORMAT:
        problems.insert(0, Problem(MANIFEST, f"expected format {FORMAT}, found {manifest.get('format')}"))
    if manifest.get("run") != owner:
        problems.insert(0, Problem(MANIFEST, "belongs to another run"))
    if problems:
        raise FormatError.of(f"{directory} is damaged:", problems)
    progress = _read(directory / "state.json")
    wrong = [name for name in ("step", "epoch", "position") if not _is_count(progress.get(name))]
    if wrong or not isinstance(progress.get("counters"), dict):
        raise FormatError(f"{directory} is damaged: state.json: {', '.join(wrong) or 'counters'} cannot be right.")
    state = TrainingState(
        step=progress["step"],
        epoch=progress["epoch"],
        position=progress["position"],
        adapter=load_safetensors(directory / "adapter.safetensors"),
        optimizer=load_safetensors(directory / "optimizer.safetensors"),
        counters=progress["counters"],
    )
    if state.step != manifest.get("step"):
        raise FormatError(
            f"{directory} is damaged: {MANIFEST} says step {manifest.get('step')}, the state {state.step}."
        )
    mx.eval(state.adapter, state.optimizer)  # nothing may refer to the files once pruning can remove them
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except InputError as error:
        raise FormatError(str(error)) from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} is not a JSON object.")
    return value
