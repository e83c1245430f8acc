"""Copies among rows: all of them, whatever their number, against the definition."""

from __future__ import annotations

import itertools
import random

from mlxlora.data.duplicates import CHUNK, SHINGLE, Rows, minhash, shared
from mlxlora.data.records import Completion, Conversation, Document, Message

WORDS = [f"word{i}" for i in range(400)]


def made(texts: list[str]) -> Rows:
    with Rows() as rows:
        rows.source("a")
        for line, text in enumerate(texts, 1):
            rows.add(Document(text), line)
    return rows


def runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def test_near_copies_are_those_that_resemble() -> None:
    drawn = random.Random(0)
    texts = []
    for _ in range(40):
        words = drawn.choices(WORDS, k=drawn.randint(100, 200))
        texts.append(" ".join(words))
        for changes in (1, 1, 3, 30):
            other = list(words)
            for _ in range(changes):
                other[drawn.randrange(len(other))] = drawn.choice(WORDS)
            texts.append(" ".join(other))
    drawn.shuffle(texts)
    rows = made(texts)
    pairs = list(zip(*(found.tolist() for found in rows.near_copies(rows.copies())), strict=True))
    sets = [runs(text) for text in texts]

    def resemblance(one: int, two: int) -> float:  # Broder's definition
        return len(sets[one] & sets[two]) / len(sets[one] | sets[two])

    assert all(original < copy and resemblance(copy, original) > 0.6 for copy, original in pairs)
    close = {two for one, two in itertools.combinations(range(len(texts)), 2) if resemblance(one, two) > 0.95}
    assert len(close & {copy for copy, _ in pairs}) >= 0.9 * len(close) > 30


def test_copies_are_found_over_all_rows() -> None:
    count = 3 * CHUNK + 7
    texts = [f"row {i}" for i in range(count)]
    texts[5 * count // 6] = "  ROW\n17 "
    twin = " ".join(WORDS[:50])
    texts[3], texts[-1] = twin, f"{twin} more"
    rows = made(texts)
    copies = rows.copies()
    assert [(row, first) for row, first in enumerate(copies.tolist()) if row != first] == [(5 * count // 6, 17)]
    near, originals = rows.near_copies(copies)
    assert (near.tolist(), originals.tolist()) == ([count - 1], [3])
    assert rows.place(count - 1) == f"a:{count}"


def test_short_texts_are_alike_too_easily() -> None:
    assert not minhash("one two three four five six seven").any()
    assert minhash("one two three four five six seven eight").all()


def test_calls_of_tools_are_part_of_a_row() -> None:
    def talk(city: str) -> Conversation:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        return Conversation([Message("user", "And there?"), Message("assistant", tool_calls=[call])])

    with Rows() as rows:
        rows.source("a")
        for city in ("Paris", "Rome", "Paris"):
            rows.add(talk(city), 1)
    assert rows.copies().tolist() == [0, 1, 0]


def test_what_train_and_validation_share() -> None:
    with Rows() as train, Rows() as valid:
        for rows, pairs in ((train, ["ab", "cd", "e"]), (valid, ["xy", "ab", "cf", "e"])):
            rows.source("a")
            for line, pair in enumerate(pairs, 1):
                rows.add(Completion(pair[:-1], pair[-1]), line)
    assert list(shared(train, valid)) == [("overlap", 1, 0), ("same_prompt", 2, 1), ("overlap", 3, 2)]


def test_no_rows_at_all() -> None:
    rows = made([])
    assert not len(rows.copies()) and not len(rows.near_copies(rows.copies())[0]) and not list(shared(rows, rows))
