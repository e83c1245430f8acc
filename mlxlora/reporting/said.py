"""What a model said to the held-out prompts before it learned and after, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Said:
    """One prompt.

    expected:     what the data says
    before:       the answer before the first step; None where nobody looked then
    after, step:  the answer at the last look since, and when that was; None where there was none
    """

    prompt: str
    expected: str
    before: str | None
    after: str | None
    step: int | None


def said(events: Sequence[dict[str, Any]]) -> list[Said]:
    """What a run's model said before its first step and at its last look, by prompt."""
    looks = [event for event in events if event["event"] == "samples" and event["prompts"]]
    if not looks:
        return []
    first = answers_of(looks[0]) if looks[0]["step"] == 0 else {}
    last = answers_of(looks[-1]) if looks[-1]["step"] > 0 else {}
    prompts = looks[-1]["prompts"]
    expected = looks[-1].get("expected") or [""] * len(prompts)
    return [
        Said(prompt, wanted, first.get(prompt), last.get(prompt), looks[-1]["step"] if last else None)
        for prompt, wanted in zip(prompts, expected, strict=False)
    ]


def answers_of(look: dict[str, Any]) -> dict[str, str]:
    """Answers by prompt."""
    return dict(zip(look["prompts"], look["answers"], strict=False))


def shortened(text: str, width: int = 100) -> str:
    """A text on one line, its middle left out where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width // 3]} … {text[-(width - width // 3 - 3) :]}"
