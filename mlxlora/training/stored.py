"""What a run directory says of itself before a process takes it: what `RunDirectory` refuses, and why."""

from __future__ import annotations

import json
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mlxlora.errors import InputError, Problem, RunError
from mlxlora.files import SCRATCH, read_json, refuse_unmakeable

OURS = ("checkpoints", "best", "adapter", "metrics.jsonl", "report.html", "config.yaml")  # what --overwrite clears
SHOWN_VALUE = 60  # characters of a changed value that a message shows


def refuse_file(path: Path) -> None:
    """Raise RunError for a place that is a file or a link, or where no directory can be made."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise RunError(f"{path} is not a directory. Choose another --out.")
    refuse_unmakeable(path)


def refuse_links(path: Path) -> None:
    """Raise RunError for links: a run writes and removes in its own directory alone, not where one leads."""
    names = (*OURS, "run.json", ".lock")
    for entry in [*path.glob("*"), *path.glob("checkpoints/*")]:
        ours = entry.parent != path or entry.name in names or SCRATCH in entry.name
        if ours and not stat.S_ISREG(mode := entry.lstat().st_mode) and not stat.S_ISDIR(mode):
            raise RunError(
                f"{entry} is a link or a special file, and a run keeps its own files. Put in its place what it"
                " stands for, or choose another --out."
            )


def read_stored(path: Path) -> dict[str, Any] | None:
    """What run.json says, None where there is none. Raises RunError for one that no run of ours has written."""
    if not (path / "run.json").exists():
        return None
    try:
        stored = read_json(path / "run.json")
    except InputError as error:
        raise RunError(f"{error} Restore it, or choose another --out.") from None
    if (
        not isinstance(stored, dict)
        or stored.get("format") != 1
        or not isinstance(stored.get("identity"), dict)
        or not _is_chosen(stored.get("chosen", {}))
    ):
        raise RunError(f"{path}/run.json is not what this version of mlxlora writes. Choose another --out.")
    return stored


def _is_chosen(chosen: Any) -> bool:
    """Whether these are settings that a run can have chosen: numbers of rows and of micro-batches."""
    return isinstance(chosen, dict) and all(
        name in ("batch_size", "accumulate") and type(value) is int and 0 < value < 1 << 31
        for name, value in chosen.items()
    )


def refuse_foreign(path: Path) -> None:
    """Raise RunError for a directory with something in it and no run.json: not ours, not even with --overwrite."""
    strange = sorted(p.name for p in path.iterdir() if p.name not in (".lock", ".DS_Store") and ".tmp-" not in p.name)
    if strange:
        raise RunError(
            f"{path} exists and is no run directory: it has no run.json, but {', '.join(strange[:5])}."
            " Choose another --out, or remove it first."
        )


def refuse_finished(path: Path, stored: dict[str, Any]) -> None:
    """Raise RunError where the run is finished."""
    if stored.get("finished"):
        raise RunError(f"{path} holds a finished run. Choose another --out, or add --overwrite to train it anew.")


def refuse_changed(path: Path, old: dict[str, Any], new: dict[str, Any], accept: Collection[str]) -> None:
    """Raise RunError, naming every setting that differs and is not among those to `accept`."""
    changed = [
        Problem(name, f"was {_short(old.get(name))}, is now {_short(new.get(name))}")
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and name not in accept
    ]
    if changed:
        raise RunError.of(
            f"{path} holds an unfinished run that was begun with other settings. Set them back to let it go on, choose"
            " another --out, or begin anew with --overwrite.",
            changed,
        )


def _short(value: Any) -> str:
    if value is None:
        return "(not set)"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 1] + "…"
