"""metrics.jsonl: one event a line, as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mlxlora.files import plain

if TYPE_CHECKING:
    from mlxlora.training.events import Event


def record(event: Event) -> dict[str, Any]:
    """An event as the object that a line holds: `event` (its name in small letters), then its fields."""
    return {"event": type(event).__name__.lower(), **plain(event)}


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """Appends events to a file, each line flushed, so that a reader sees every whole line at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def __call__(self, event: Event) -> None:
        """Write one event. Numbers that are not finite are written as null: JSON has no others."""
        values = {key: finite(value) for key, value in record(event).items()}
        self.file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self.file.flush()
