"""What a directory's manifest says of the files beside it: size and SHA-256, written last and compared first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxlora.errors import Problem
from mlxlora.files.reading import sha256

MANIFEST = "manifest.json"


def file_records(directory: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """name → size and SHA-256, for a manifest."""
    return {name: {"bytes": (directory / name).stat().st_size, "sha256": sha256(directory / name)} for name in names}


def wrong_files(directory: Path, records: Any, names: Sequence[str]) -> list[Problem]:
    """What differs between the files of a directory and the records of its manifest."""
    if not isinstance(records, dict):
        return [Problem(MANIFEST, "lists no files")]
    problems = []
    for name in names:
        record, path = records.get(name), directory / name
        if not isinstance(record, dict):
            problems.append(Problem(name, "is not in the manifest"))
        elif not path.is_file():
            problems.append(Problem(name, "is missing"))
        elif (size := path.stat().st_size) != record.get("bytes"):
            found = f"expected {record.get('bytes')} bytes, found {size}"
            problems.append(Problem(name, found, "It was cut off or replaced: copy the directory again, whole"))
        elif sha256(path) != record.get("sha256"):
            problems.append(Problem(name, "its bytes are not those that were written (SHA-256 differs)"))
    return problems
