"""metrics.jsonl: one event a line, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora.files import plain

if TYPE_CHECKING:
    from mlxlora.training.events import Event


def record(event: Event) -> dict[str, Any]:
    """An event as the object that a line holds: `event` (its name in small letters), then its fields."""
    return {"event": type(event).__name__.lower(), **plain(event)}


def finite(value: Any) -> Any:
    """The value, or None for a float that is infinite or no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append(path: Path, event: Event) -> dict[str, Any]:
    """Write one event as one whole line; returns what the line holds. Numbers that are not finite become null: JSON
    has no others."""
    values = {key: finite(value) for key, value in record(event).items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, ensure_ascii=False) + "\n")
    return values


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file, one after another; a last line that a kill cut short is left out. An absent file holds
    none."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and "event" in event:
                yield event
