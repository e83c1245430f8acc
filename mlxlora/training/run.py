"""The run directory: one writer, nothing half written, and the way back to the last whole checkpoint.

    RUN/config.yaml            everything resolved; `mlxlora train --config` repeats the run
    RUN/run.json               what the run depends on (its identity), and whether it is finished
    RUN/metrics.jsonl          one event a line
    RUN/adapter/               the newest whole adapter        ┐ each appears by rename or exchange:
    RUN/best/                  the one of the best validation  │ a reader finds the old one or the new one
    RUN/checkpoints/step-N/    see checkpoint.py               ┘
    RUN/.lock                  there while a process trains

Order of publishing: `best/`, `adapter/`, then the checkpoint. A kill in between leaves an adapter one save ahead of the
newest checkpoint; the run goes on from that checkpoint and, being deterministic, arrives at the same adapter again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from mlxlora.errors import DiskFullError, FormatError, Problem, RunError, TrainingError
from mlxlora.files import (
    human_bytes,
    new_directory,
    remove_directory,
    require_space,
    sweep_scratch,
    sync,
    write_json,
    write_whole,
)
from mlxlora.parameters import bytes_of
from mlxlora.training.checkpoint import TrainingState, read_checkpoint, write_checkpoint
from mlxlora.training.lock import RunLock
from mlxlora.training.stored import (
    OURS,
    read_stored,
    refuse_changed,
    refuse_file,
    refuse_finished,
    refuse_foreign,
    refuse_links,
)

AdapterWriter = Callable[[Path], None]
T = TypeVar("T")
STEP = re.compile(r"step-(\d{7,})")
HEADERS = 1_000_000  # bytes; what a save takes beside its tensors, generously


class RunDirectory:
    """A run directory held by this process alone, from `open` to the end of the `with` block.

    `notices` collects what its owner should be told (a damaged checkpoint that was passed over).
    """

    def __init__(self, path: Path, lock: RunLock, identity: dict[str, Any], stored: dict[str, Any] | None) -> None:
        self.path = path
        self.notices: list[str] = []
        self._lock = lock
        self._identity = identity
        self._owner = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._resumes = stored is not None
        self._overwrites = False
        self._begun = stored is not None
        self._saved = bool(stored and stored.get("saved"))
        self.chosen: dict[str, Any] = dict(stored.get("chosen") or {}) if stored else {}
        """settings that were left open and that the run chose when it began; written with `run.json`"""

    @classmethod
    def look(cls, path: Path, *, overwrite: bool = False) -> None:
        """Raise RunError for what `open` would refuse whatever the identity: in use, finished, no run directory.

        For the very start of a command; writes nothing and holds nothing.
        """
        path = Path(path)
        refuse_file(path)
        if not path.is_dir():
            return
        RunLock.refuse_held(path)
        refuse_links(path)
        stored = read_stored(path)
        if stored is None:
            refuse_foreign(path)
        elif not overwrite:
            refuse_finished(path, stored)

    @classmethod
    def open(
        cls, path: Path, *, identity: dict[str, Any], overwrite: bool = False, accept: Collection[str] = ()
    ) -> RunDirectory:
        """Take the run directory `path` for this process. Nothing in it changes before `write_config`.

        identity: field → JSON value or hash; what must not change when an unfinished run goes on
        overwrite: begin anew, whatever stands there; it is cleared by `write_config`, once all else has been checked
        accept: fields that may differ all the same; the run keeps the identity that it was begun with

        Raises RunError when another process trains in it, it is finished, it is no run directory, or it was begun
        with another identity (each changed field is named, with the old and the new value).
        """
        path = Path(path)
        identity = json.loads(json.dumps(identity))
        refuse_file(path)
        lock = RunLock.take(path)
        try:
            refuse_links(path)
            stored = read_stored(path)
            run = cls(path, lock, identity, None if overwrite else stored)
            run._overwrites = overwrite and stored is not None
            if stored is None:
                refuse_foreign(path)
            elif not overwrite:
                refuse_finished(path, stored)
                refuse_changed(path, stored["identity"], identity, accept)
                run = cls(path, lock, stored["identity"], stored)
            return run
        except BaseException:
            lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the run directory back. One that was created and never begun is removed again."""
        self._lock.release()

    @property
    def metrics_path(self) -> Path:
        """Where the events go, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def adapter_path(self) -> Path:
        """The newest whole adapter, once there is one."""
        return self.path / "adapter"

    @property
    def best_path(self) -> Path:
        """The adapter of the lowest validation loss, once there is one."""
        return self.path / "best"

    def write_config(self, text: str) -> None:
        """Begin (or go on): clear what is to be overwritten, then write `run.json` and `config.yaml`.

        The first thing that changes the directory: call it when everything has been validated.
        """
        sweep_scratch(self.path)
        if (self.path / "checkpoints").is_dir():
            sweep_scratch(self.path / "checkpoints")
        if self._overwrites:
            # The old run.json goes last: killed half way, this is still a run that only --overwrite may touch
            for name in OURS:
                if (self.path / name).is_dir():
                    remove_directory(self.path / name)
                else:
                    (self.path / name).unlink(missing_ok=True)
            self._overwrites = False
        if not self._begun:
            self._write_record()
            self._begun = True
            self._lock.keep_directory()
        write_whole(self.path / "config.yaml", text)

    def follow(self) -> None:
        """Go after the directory where it was renamed since. Raises TrainingError when it was removed: nothing is made
        anew where it stood."""
        place = self._lock.place()
        if place is None or not (place / "run.json").exists():
            raise TrainingError(
                f"{self.path} is no longer there: it was deleted, or moved to another disk, while the run wrote to it."
                " So the run ends here, and nothing is made anew in its place. Where it was moved, what had been saved"
                " is in it: the same command with its new place as --out goes on from there."
            )
        self.path = place

    def written(self, write: Callable[[], T]) -> T:
        """What `write` returns, which writes into `path`; once more where that was renamed in the meantime."""
        while True:
            self.follow()
            before = self.path
            try:
                return write()
            except FileNotFoundError:
                self.follow()
                if self.path == before:
                    raise

    def _write_record(self, **more: Any) -> None:
        record = {"format": 1, "identity": self._identity, "saved": self._saved, "finished": False}
        record |= {"chosen": self.chosen} if self.chosen else {}
        write_json(self.path / "run.json", record | more)

    def require_space(self, state: TrainingState, *, keep: int, adapter_bytes: int | None = None) -> None:
        """Raise TrainingError when the disk has not the room for what a run with this state will save.

        keep: how many checkpoints stay; one more stands beside them while it is written, and so does an adapter
        """
        adapter = bytes_of(state.adapter) if adapter_bytes is None else adapter_bytes
        self._require((keep + 1) * (state.nbytes + HEADERS) + 3 * (adapter + HEADERS), "this run's checkpoints")

    def _require(self, needed: int, what: str) -> None:
        try:
            require_space(self.path, needed, what)
        except DiskFullError as error:
            raise TrainingError(str(error)) from None

    def checkpoints(self) -> list[Path]:
        """The published checkpoints, oldest first."""
        found = (self.path / "checkpoints").glob("step-*")
        return sorted((p for p in found if STEP.fullmatch(p.name)), key=lambda p: int(p.name[5:]))

    def latest(self) -> TrainingState | None:
        """The state of the newest whole checkpoint, or None when this run has not saved one yet.

        A damaged checkpoint is passed over (see `notices`) when an older whole one exists. `metrics.jsonl` is cut back
        to the step that is returned, so that the file of a resumed run reads like that of one never interrupted.
        Raises RunError when checkpoints exist and none is whole, or when they are missing from a run that had saved.
        """
        if not self._resumes:
            return None
        damaged: list[Problem] = []
        for path in reversed(self.checkpoints()):
            try:
                state = read_checkpoint(path, self._owner)
            except FormatError as error:
                damaged.append(Problem(path.name, "; ".join(str(error).split("\n"))))
                continue
            self.notices += [f"{self.path}: passed over a damaged checkpoint: {problem}" for problem in damaged]
            self._cut_metrics(state.step)
            return state
        if damaged:
            raise RunError.of(
                f"{self.path} cannot go on: no checkpoint is whole. Restore one from a backup, or begin anew with"
                " --overwrite.",
                damaged,
            )
        if self._saved:
            raise RunError(
                f"{self.path} cannot go on: its directory 'checkpoints' is missing or empty, but it had saved."
                " Restore it, or begin anew with --overwrite."
            )
        self._cut_metrics(-1)  # killed before its first save: it begins again
        return None

    def _cut_metrics(self, step: int) -> None:
        """Drop the events after `step`, and a last line that a kill cut short."""
        if not self.metrics_path.exists():
            return
        kept = []
        content = self.metrics_path.read_bytes()
        for line in content.splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                reached = event.get("step", 0) if isinstance(event, dict) else None
                if line.endswith(b"\n") and isinstance(reached, int) and reached <= step:
                    kept.append(line)
        if b"".join(kept) != content:
            write_whole(self.metrics_path, b"".join(kept))

    def save(self, state: TrainingState, *, adapter_writer: AdapterWriter, best: bool, keep: int) -> Path:
        """Publish a checkpoint, `adapter/` and, when `best`, `best/`; keep the newest `keep` checkpoints.

        adapter_writer: writes the adapter of this state into the directory that it is given
        Returns the checkpoint's directory. Raises TrainingError when the disk runs full: what had been published stays.
        """
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, found {keep}")
        if not self._begun:
            raise RuntimeError("write_config comes before the first save")
        return self.written(partial(self._save, state, adapter_writer, best, keep))

    def _save(self, state: TrainingState, adapter_writer: AdapterWriter, best: bool, keep: int) -> Path:
        adapter = bytes_of(state.adapter)
        self._require(state.nbytes + (2 if best else 1) * adapter + 3 * HEADERS, f"the checkpoint of step {state.step}")
        target = self.path / "checkpoints" / f"step-{state.step:07d}"
        try:
            with contextlib.ExitStack() as stack:
                # They leave the stack in reverse: best, adapter, checkpoint. All are complete before one is published.
                write_checkpoint(stack.enter_context(new_directory(target, replace=True)), state, self._owner)
                adapter_writer(stack.enter_context(new_directory(self.adapter_path, replace=True)))
                if best:
                    adapter_writer(stack.enter_context(new_directory(self.best_path, replace=True)))
        except DiskFullError as error:
            last = self.checkpoints()
            whole = f" The last whole checkpoint is {last[-1].name}." if last else ""
            needed = human_bytes(state.nbytes + (2 if best else 1) * adapter)
            raise TrainingError(f"{error} A save takes {needed}.{whole}") from error
        if self.metrics_path.exists():
            sync(self.metrics_path)
        if not self._saved:
            self._saved = True
            self._write_record()
        self._prune(state.step, keep)
        return target

    def _prune(self, step: int, keep: int) -> None:
        """Remove what is older than the newest `keep`, and what a damaged past left beyond `step`."""
        paths = self.checkpoints()
        beyond = [path for path in paths if int(path.name[5:]) > step]
        for path in beyond + [path for path in paths if path not in beyond][:-keep]:
            remove_directory(path)

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run finished: it is not trained on or overwritten by accident from now on."""
        self.written(lambda: self._write_record(finished=True, summary=summary))
