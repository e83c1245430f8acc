"""What a run was foretold to take, in words: the first thing that `train` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxlora.files import human_bytes
from mlxlora.reporting.clock import clock

if TYPE_CHECKING:
    from mlxlora.training.events import Started


def foretold(started: Started) -> str:
    """Peak, duration, and what was chosen for them and why, in a line; empty where nothing was foretold."""
    if not started.predicted_peak:
        return ""
    limit = f" of {human_bytes(started.memory_limit)}" if started.memory_limit else ""
    parts = [f"peak {human_bytes(started.predicted_peak)}{limit}"]
    if started.predicted_seconds:
        left = started.predicted_seconds * (1 - started.step / max(started.steps, 1))
        speed = started.predicted_tokens_per_second
        parts.append(f"about {clock(left)}" + (f" at {speed:,.0f} tokens/s" if speed else ""))
    why = f": {started.why}" if started.why else ""
    return ", ".join(parts) + (f" ({started.chosen}{why})" if started.chosen else "")
