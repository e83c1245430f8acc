"""Questions over small tables, each with the SQL that answers it and the rows that prove it.

A question is kept only when its rows make the answer telling: the gold result is not empty and differs from the
results of the queries that a misreading would give.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlxlora.demo.names import HELD_OUT, TRAINING, Topic, invented_topic, mixed_topic
from mlxlora.demo.queries import Condition, Query
from mlxlora.demo.score import Table, results_agree, run_query


@dataclass(frozen=True, slots=True)
class Question:
    """One question: `tables` with their rows, the `text` that is asked, and the `query` that answers it."""

    tables: tuple[Table, ...]
    text: str
    query: Query

    @property
    def sql(self) -> str:
        """The gold answer."""
        return self.query.sql()

    @property
    def prompt(self) -> str:
        """What the user says: the tables' columns, a line each, and the question."""
        return "\n".join([*(table.schema() for table in self.tables), self.text])

    def messages(self) -> list[dict[str, str]]:
        """The chat up to the question."""
        return [{"role": "user", "content": self.prompt}]


def _fill(table: str, texts: dict[str, tuple[str, ...]], numbers: Sequence[str], rng: random.Random) -> Table:
    columns = [(column, "text") for column in texts] + [(column, "number") for column in numbers]
    rng.shuffle(columns)
    high = {column: rng.choice((20, 90, 400, 999)) for column in numbers}
    rows = tuple(
        tuple(rng.choice(texts[column]) if kind == "text" else rng.randint(1, high[column]) for column, kind in columns)
        for _ in range(rng.randint(9, 14))
    )
    return Table(table, tuple(columns), rows)


def make_table(topic: Topic, rng: random.Random) -> Table:
    """A table of two or three text columns and one to three columns of numbers of the topic, filled at random."""
    texts = dict(rng.sample(list(topic.texts.items()), rng.randint(2, min(3, len(topic.texts)))))
    return _fill(topic.table, texts, rng.sample(topic.numbers, rng.randint(1, 3)), rng)


def make_join_tables(first: Topic, second: Topic, rng: random.Random) -> tuple[Table, Table]:
    """Two small tables with one text column in common, whose values are unique in the second."""
    key, values = rng.choice(list(first.texts.items()))
    own = rng.choice([column for column in first.texts if column != key])
    left = _fill(first.table, {key: values, own: first.texts[own]}, rng.sample(first.numbers, 1), rng)
    other, fillers = rng.choice(list(second.texts.items()))
    right = _fill(second.table, {key: values, other: fillers}, rng.sample(second.numbers, 1), rng)
    at = [name for name, _ in right.columns].index(key)
    unique = {row[at]: row for row in right.rows}
    return left, Table(right.name, right.columns, tuple(unique.values()))


def _condition(table: Table, rng: random.Random, avoid: frozenset[str] = frozenset()) -> Condition:
    column, kind = rng.choice([pair for pair in table.columns if pair[0] not in avoid])
    values = [row[table.position(column)] for row in table.rows]
    if kind == "text":
        return Condition(column, rng.choice(("=", "=", "=", "!=")), rng.choice(values))
    return Condition(column, rng.choice(("<", ">")), rng.choice(values))


def _conditions(
    table: Table, rng: random.Random, counts: Sequence[int], avoid: frozenset[str]
) -> tuple[Condition, ...]:
    found: list[Condition] = []
    for _ in range(rng.choice(counts)):
        taken = avoid | {condition.column for condition in found}
        if any(name not in taken for name, _ in table.columns):
            found.append(_condition(table, rng, taken))
    return tuple(found)


def _with_conditions(query: dict[str, Any], table: Table, rng: random.Random, counts: Sequence[int]) -> Query:
    avoid = frozenset(str(query[name]) for name in ("column", "group", "order") if query.get(name))
    conditions = _conditions(table, rng, counts, avoid)
    return Query(
        **query,
        table=table.name,
        conditions=conditions,
        connective=rng.choice(("AND", "AND", "OR")) if len(conditions) == 2 else "AND",
    )


def _select(table: Table, rng: random.Random) -> Query:
    column = rng.choice(table.columns)[0]
    return _with_conditions({"kind": "select", "column": column}, table, rng, (1, 1, 2))


def _count(table: Table, rng: random.Random) -> Query:
    return _with_conditions({"kind": "count", "column": "*", "aggregate": "count"}, table, rng, (1, 1, 2))


def _aggregate(table: Table, rng: random.Random) -> Query:
    query = {
        "kind": "aggregate",
        "column": rng.choice(table.named("number")),
        "aggregate": rng.choice(("max", "min", "avg", "sum")),
    }
    return _with_conditions(query, table, rng, (0, 1, 1))


def _top(table: Table, rng: random.Random) -> Query:
    query = {"kind": "top", "column": rng.choice(table.named("text")), "order": rng.choice(table.named("number"))}
    limit = rng.choice((1, 1, 2, 3))
    return _with_conditions({**query, "descending": rng.random() < 0.5, "limit": limit}, table, rng, (0, 0, 1))


def _order(table: Table, rng: random.Random) -> Query:
    query = {"kind": "order", "column": rng.choice(table.named("text")), "order": rng.choice(table.named("number"))}
    return _with_conditions({**query, "descending": rng.random() < 0.5}, table, rng, (0, 0, 1))


def _group(table: Table, rng: random.Random) -> Query:
    query: dict[str, Any] = {"kind": "group", "group": rng.choice(table.named("text"))}
    if rng.random() < 0.5:
        query |= {"column": "*", "aggregate": "count"}
    else:
        query |= {"column": rng.choice(table.named("number")), "aggregate": rng.choice(("max", "min", "avg", "sum"))}
    return _with_conditions(query, table, rng, (0, 0, 1))


def _distinct(table: Table, rng: random.Random) -> Query:
    return _with_conditions(
        {"kind": "distinct", "column": rng.choice(table.named("text")), "distinct": True}, table, rng, (0, 1)
    )


KINDS: dict[str, Callable[[Table, random.Random], Query]] = {
    "select": _select,
    "count": _count,
    "aggregate": _aggregate,
    "top": _top,
    "order": _order,
    "group": _group,
    "distinct": _distinct,
}
JOIN_SHARE = 0.08  # of all questions


def join_query(left: Table, right: Table, rng: random.Random) -> Query:
    """A column of the left table where something holds in the right one."""
    key = next(name for name, _ in left.columns if name in dict(right.columns))
    column = rng.choice([name for name, _ in left.columns if name != key])
    condition = _condition(right, rng, frozenset({key}))
    return Query("join", left.name, column, conditions=(condition,), join=(right.name, key))


def make_query(tables: Sequence[Table], rng: random.Random) -> Query:
    """A query of any kind: a join over two tables, one of the other kinds over one."""
    if len(tables) == 2:
        return join_query(tables[0], tables[1], rng)
    return KINDS[rng.choice(list(KINDS))](tables[0], rng)


def is_telling(tables: Sequence[Table], query: Query) -> bool:
    """Whether the rows tell the query from its neighbours and from an empty result."""
    gold = run_query(tables, query.sql())
    if not gold or gold == [(None,)] or gold == [(0,)]:
        return False
    ordered = bool(query.order)
    return not any(results_agree(gold, run_query(tables, near.sql()), ordered=ordered) for near in query.neighbours())


def make_tables(
    topics: Callable[[random.Random], Topic], rng: random.Random, joins: float = JOIN_SHARE
) -> tuple[Table, ...]:
    """One table, or for a join (a share `joins` of all) two."""
    first = topics(rng)
    if rng.random() >= joins:
        return (make_table(first, rng),)
    second = topics(rng)
    while first.words & second.words:
        second = topics(rng)
    return make_join_tables(first, second, rng)


def make_question(topics: Callable[[random.Random], Topic], rng: random.Random) -> Question:
    """A telling question about tables on what `topics` chooses."""
    while True:
        tables = make_tables(topics, rng)
        for _ in range(4):
            query = make_query(tables, rng)
            if is_telling(tables, query):
                return Question(tables, query.question(rng), query)


def training_topic(rng: random.Random) -> Topic:
    """What the chat data set asks about: training topics, as they are or mixed, and invented words."""
    return rng.choice((lambda r: r.choice(TRAINING), mixed_topic, invented_topic, invented_topic))(rng)


def held_out_topic(rng: random.Random) -> Topic:
    """What the score asks about: only topics that nothing was trained on."""
    return rng.choice(HELD_OUT)


def training_questions(count: int, *, seed: int = 1) -> list[Question]:
    """Questions to train on; the same for the same seed."""
    rng = random.Random(f"training {seed}")
    return [make_question(training_topic, rng) for _ in range(count)]


def held_out_questions(count: int, *, seed: int = 1) -> list[Question]:
    """Questions to score on, about tables, columns and values that training never saw; the same for the same seed."""
    rng = random.Random(f"held-out {seed}")
    return [make_question(held_out_topic, rng) for _ in range(count)]
