"""A part of the rows, drawn evenly from all of them in one pass."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from mlxlora.data.records import Record


class Draw:
    """Keeps `most` of the rows that it is shown, each with the same chance, and always the same ones (Vitter 1985)."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.random = random.Random(0)
        self.seen = 0
        self.kept: list[tuple[int, int, Record, int]] = []  # place among all rows, source, record, line

    def take(self, source: int, records: Iterable[tuple[Record, int]]) -> None:
        """Look at the records of a source, with their lines."""
        for record, line in records:
            entry = (self.seen, source, record, line)
            self.seen += 1
            if len(self.kept) < self.most:
                self.kept.append(entry)
            elif (place := self.random.randrange(self.seen)) < self.most:
                self.kept[place] = entry

    def of(self, source: int) -> Iterator[tuple[Record, int]]:
        """What was kept of a source, in its order."""
        mine = sorted((entry for entry in self.kept if entry[1] == source), key=lambda entry: entry[0])
        return ((record, line) for _, _, record, line in mine)
