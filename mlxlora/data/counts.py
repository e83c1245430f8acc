"""What became of the rows: counted, and listed where they are left out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mlxlora.errors import DataError, Problem

LISTED = 1000  # rows listed by file:line; beyond, they are only counted
SHARE = 0.01  # of samples with nothing to learn from that is accepted without asking


@dataclass
class Counts:
    """What became of the rows of one split.

    rows, samples: read and kept
    truncated, dropped: longer than max_length and cut, or left out
    short: left out, because they have fewer tokens than min_length
    unlocated: left out, because their answer could not be located in the rendered template
    untrained: left out, because no token of theirs is learned
    rejected: left out, because their ending is labelled as bad
    dropped_thinking: assistant turns whose reasoning the template leaves out
    unended: samples with a turn that no token ends
    listed: `file:line` and reason of the rows left out, of the first thousand
    cut: `file:line` and length of those that were truncated, of the first thousand
    """

    rows: int = 0
    samples: int = 0
    truncated: int = 0
    dropped: int = 0
    short: int = 0
    unlocated: int = 0
    untrained: int = 0
    rejected: int = 0
    dropped_thinking: int = 0
    unended: int = 0
    listed: list[Problem] = field(default_factory=list)
    cut: list[Problem] = field(default_factory=list)

    def leave_out(self, origin: str, reason: str) -> None:
        """List a row that is left out."""
        if len(self.listed) < LISTED:
            self.listed.append(Problem(origin, reason))

    def cut_down(self, origin: str, length: int, limit: int) -> None:
        """Count and list a sample that is cut."""
        self.truncated += 1
        if len(self.cut) < LISTED:
            self.cut.append(Problem(origin, f"{length} tokens are cut to max_length {limit}"))

    @property
    def lost(self) -> int:
        """Samples with nothing to learn from."""
        return self.unlocated + self.untrained

    def refuse_unusable(self, split: str, *, allow: bool) -> None:
        """Raise DataError when no sample is left, or when too many have nothing to learn from."""
        if not self.samples:
            nothing = "every row is labelled as bad" if self.rejected else "there are no rows"
            problems = self.listed or [Problem("", nothing)]
            raise DataError.of(f"no sample of the {split} data can be used:", problems)
        everything = self.samples + self.lost
        if self.lost > SHARE * everything and not allow:
            raise DataError.of(
                f"{self.lost} of {everything} samples of the {split} data have nothing to learn from. Correct them, "
                "or leave them out with --samples.allow_unusable:",
                self.listed,
            )

    def as_dict(self) -> dict[str, Any]:
        """For a store's manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Counts:
        """From a store's manifest."""
        lists = {name: [Problem(**problem) for problem in value[name]] for name in ("listed", "cut")}
        return cls(**{**value, **lists})
