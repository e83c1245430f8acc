"""The text that the embedded model was pretrained on, made from a seed.

It shows schemas, tables in prose, notes with the SQL that they stand for, SQL with notes, and chats in which somebody
asks a question and is told in prose what they ask for. In no chat is there any SQL: a chat that answers with SQL is
what the adapter is to learn. Most names are invented, so that names can only be copied, not remembered.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlxlora.demo.names import TRAINING, Topic, invented_topic, invented_word, mixed_topic
from mlxlora.demo.questions import JOIN_SHARE, make_query, make_tables
from mlxlora.demo.score import Table

END_OF_TEXT = "<|endoftext|>"
TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the documents are about."""

    pieces: tuple[str, ...] = ()
    """of the tokenizer's vocabulary: half of the invented words are made of them"""
    joins: float = JOIN_SHARE
    """the share of documents about two tables"""
    topics: Callable[[random.Random], Topic] | None = None
    """what tables are about; default: mostly invented words"""

    def topic(self, rng: random.Random) -> Topic:
        """What one table is about."""
        if self.topics:
            return self.topics(rng)
        draw = rng.random()
        if draw < 0.8:
            return invented_topic(rng, self.pieces)
        return mixed_topic(rng) if draw < 0.9 else rng.choice(TRAINING)

    def tables(self, rng: random.Random) -> tuple[Table, ...]:
        """One table, or two that can be joined."""
        return make_tables(self.topic, rng, self.joins)


def _schema(tables: tuple[Table, ...]) -> str:
    return "\n".join(table.schema() for table in tables)


def notes_with_sql(rng: random.Random, recipe: Recipe) -> str:
    """A schema and a few notes, each followed by its query."""
    tables = recipe.tables(rng)
    lines = [_schema(tables)]
    for query in [make_query(tables, rng) for _ in range(rng.randint(2, 5))]:
        lines += [f"-- {query.note(rng)}", query.sql()]
    return "\n".join(lines)


def sql_with_notes(rng: random.Random, recipe: Recipe) -> str:
    """A schema and a few queries, each followed by what it fetches."""
    tables = recipe.tables(rng)
    lines = [_schema(tables)]
    for query in [make_query(tables, rng) for _ in range(rng.randint(2, 4))]:
        lines.append(f"{query.sql()}\nThis fetches the {query.note(rng)}.")
    return "\n".join(lines)


def told_in_prose(rng: random.Random, recipe: Recipe) -> str:
    """A chat: a table and a question; the answer says in prose what is asked for."""
    tables = recipe.tables(rng)
    turns = []
    for index, query in enumerate(make_query(tables, rng) for _ in range(rng.choice((1, 1, 2, 3)))):
        asked = query.question(rng) if index else f"{_schema(tables)}\n{query.question(rng)}"
        turns.append(
            f"{TURN}user\n{asked}{END_OF_TURN}\n{TURN}assistant\nThat is the {query.note(rng)}.{END_OF_TURN}\n"
        )
    return "".join(turns)


def filled_table(rng: random.Random, recipe: Recipe) -> str:
    """A schema and some of its rows in prose."""
    (table,) = recipe.tables(rng)[:1]
    lines = [table.schema()]
    for row in table.rows[: rng.randint(2, 4)]:
        cells = [
            f"{column} is {value if kind == 'number' else repr(value)}"
            for (column, kind), value in zip(table.columns, row, strict=True)
        ]
        lines.append(f"In {table.name} the " + " , ".join(cells) + ".")
    return "\n".join(lines)


def repeated_words(rng: random.Random, recipe: Recipe) -> str:
    """A list of invented words and numbers, said again in the same and in another order."""
    words = [
        invented_word(rng, recipe.pieces) if rng.random() < 0.75 else str(rng.randint(1, 999))
        for _ in range(rng.randint(6, 14))
    ]
    shuffled = rng.sample(words, len(words))
    pairs = [f"{one} {two}" for one, two in itertools.pairwise(words)]
    return " ".join(
        [
            "Words :",
            *words,
            ".",
            "Again :",
            *words,
            ".",
            "Pairs :",
            " , ".join(rng.sample(pairs, len(pairs) // 2)),
            ".",
            "Mixed :",
            *shuffled,
            ".",
        ]
    )


KINDS: dict[Callable[[random.Random, Recipe], str], float] = {
    notes_with_sql: 0.40,
    sql_with_notes: 0.15,
    told_in_prose: 0.30,
    filled_table: 0.08,
    repeated_words: 0.07,
}
"""The kinds of documents, each with its share of them."""


def documents(seed: int, count: int | None = None, *, recipe: Recipe = Recipe()) -> Iterator[str]:
    """Documents without end, or `count` of them; the same for the same seed."""
    rng = random.Random(f"corpus {seed}")
    makers, shares = list(KINDS), list(KINDS.values())
    for _ in itertools.count() if count is None else range(count):
        yield rng.choices(makers, shares)[0](rng, recipe)
