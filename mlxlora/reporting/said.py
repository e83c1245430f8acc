"""What a model said to the held-out prompts before it learned and after, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Said:
    """One prompt.

    expected:     what the data says
    before:       the answer at the first look
    after, step:  the answer at the last look, and when that was; None where there was only one
    """

    prompt: str
    expected: str
    before: str
    after: str | None
    step: int | None


def said(events: Sequence[dict[str, Any]]) -> list[Said]:
    """The first and the last look of a run, by prompt."""
    looks = [event for event in events if event["event"] == "samples"]
    if not looks:
        return []
    first, last = looks[0], looks[-1]
    expected = first.get("expected") or [""] * len(first["prompts"])
    later = dict(zip(last["prompts"], last["answers"], strict=False)) if len(looks) > 1 else {}
    return [
        Said(prompt, wanted, answer, later.get(prompt), last["step"] if prompt in later else None)
        for prompt, wanted, answer in zip(first["prompts"], expected, first["answers"], strict=False)
    ]


def shortened(text: str, width: int = 100) -> str:
    """A text on one line, its middle left out where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width // 3]} … {text[-(width - width // 3 - 3) :]}"
