"""A query: as SQL, as the question somebody asks for it, and as a note that says what it fetches.

The three say the same thing in three ways. Text for pretraining pairs notes with SQL and questions with notes; only the
chat data set, which the adapter is trained on, answers a question with SQL.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

AGGREGATES = {"max": "highest", "min": "lowest", "avg": "average", "sum": "total"}
_SUPERLATIVES = {
    "max": ("highest", "largest"),
    "min": ("lowest", "smallest"),
    "avg": ("average", "mean"),
    "sum": ("total", "overall"),
}
_COMPARISONS = {
    ">": ("above", "more than", "over"),
    "<": ("below", "less than", "under"),
    "=": ("is",),
    "!=": ("is not",),
}


@dataclass(frozen=True, slots=True)
class Condition:
    """`column operator value`; a str value is quoted."""

    column: str
    operator: str
    value: str | int

    def sql(self) -> str:
        return f"{self.column} {self.operator} {_literal(self.value)}"

    def words(self, rng: random.Random) -> str:
        """As part of a sentence: `rain is above 12`, `city is 'Lisbon'`."""
        words = rng.choice(_COMPARISONS[self.operator])
        verb = "" if self.operator in ("=", "!=") else "is "
        return f"{self.column} {verb}{words} {_literal(self.value)}"


def _literal(value: str | int) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


@dataclass(frozen=True, slots=True)
class Query:
    """One SELECT statement.

    kind:       which of `KINDS` it is
    table:      read from
    column:     selected or aggregated; `*` for counting rows
    aggregate:  "", count, max, min, avg, sum
    conditions: none, one or two
    connective: AND or OR, between two conditions
    group:      the column of GROUP BY, selected too
    order:      the column of ORDER BY
    descending: highest first
    limit:      rows kept; 0 keeps all
    distinct:   each value once
    join:       (other table, column that both have), or None
    """

    kind: str
    table: str
    column: str
    aggregate: str = ""
    conditions: tuple[Condition, ...] = ()
    connective: str = "AND"
    group: str = ""
    order: str = ""
    descending: bool = False
    limit: int = 0
    distinct: bool = False
    join: tuple[str, str] | None = None

    def sql(self) -> str:
        """The statement. Names stand between spaces, so that each is the same tokens wherever it stands."""
        selected = f"{self.aggregate}( {self.column} )" if self.aggregate else self.column
        words = [
            "SELECT",
            *(["DISTINCT"] if self.distinct else []),
            *([self.group, ","] if self.group else []),
            selected,
        ]
        words += ["FROM", self.table]
        if self.join:
            words += ["JOIN", self.join[0], "USING (", self.join[1], ")"]
        if self.conditions:
            words += ["WHERE", f" {self.connective} ".join(condition.sql() for condition in self.conditions)]
        if self.group:
            words += ["GROUP BY", self.group]
        if self.order:
            words += ["ORDER BY", self.order, *(["DESC"] if self.descending else [])]
        if self.limit:
            words += ["LIMIT", str(self.limit)]
        return " ".join(words)

    def question(self, rng: random.Random) -> str:
        """The question that somebody asks who knows the table and no SQL."""
        where = self._where(rng)
        column, table = self.column, self.table
        if self.kind == "join":
            other = self.join[0] if self.join else ""
            ask = rng.choice(("what is the", "show the", "give me the"))
            return f"Taking {table} and {other} together, {ask} {column}{where}."
        if self.group:
            per = f"{rng.choice(('for each', 'for every', 'per'))} {self.group}"
            if self.aggregate == "count":
                return rng.choice((f"How many {table} are there {per}{where}?", f"Count the {table} {per}{where}."))
            return f"What is the {self._superlative(rng)} {column} {per}{where}?"
        if self.aggregate == "count":
            return rng.choice(
                (
                    f"How many {table} are there{where}?",
                    f"Count the {table}{where}.",
                    f"What number of {table} do we have{where}?",
                )
            )
        if self.aggregate:
            return rng.choice(
                (
                    f"What is the {self._superlative(rng)} {column}{where}?",
                    f"Tell me the {self._superlative(rng)} {column}{where}.",
                )
            )
        if self.order and self.limit == 1:
            return f"Which {column} has the {self._extreme(rng)} {self.order}{where}?"
        if self.order and self.limit:
            return f"Which {self.limit} {column} have the {self._extreme(rng)} {self.order}{where}?"
        if self.order:
            first = f"{self._extreme(rng)} first"
            return rng.choice(
                (
                    f"List every {column} by {self.order}, {first}{where}.",
                    f"Sort the {column} by {self.order}, {first}{where}.",
                )
            )
        if self.distinct:
            return rng.choice((f"What different {column} are there{where}?", f"List each {column} once{where}."))
        return rng.choice(
            (
                f"What is the {column}{where}?",
                f"Show the {column}{where}.",
                f"Which {column} do we have{where}?",
                f"Give me every {column}{where}.",
            )
        )

    def note(self, rng: random.Random) -> str:
        """A phrase that names the result, as a comment above a query would."""
        where = self._where(rng)
        column = self.column
        if self.kind == "join":
            return f"{column} of {self.table} joined with {self.join[0] if self.join else ''}{where}"
        source = f"of {self.table}" if rng.random() < 0.8 else f"in {self.table}"
        if self.aggregate == "count":
            phrase = f"number {source}"
        elif self.aggregate:
            phrase = f"{self._superlative(rng)} {column} {source}"
        elif self.limit:
            phrase = f"{column} {source} at the {self.limit} {self._extreme(rng)} {self.order}"
        elif self.order:
            phrase = f"{column} {source} by {self.order} , {self._extreme(rng)} first"
        elif self.distinct:
            phrase = f"different {column} {source}"
        else:
            phrase = f"{column} {source}"
        return phrase + (f" per {self.group}" if self.group else "") + where

    def neighbours(self) -> list[Query]:
        """Queries that a wrong reading of the question would give; their results tell a right answer from luck."""
        near = [
            replace(self, conditions=self.conditions[:index] + self.conditions[index + 1 :])
            for index in range(len(self.conditions))
        ]
        for index, condition in enumerate(self.conditions):
            for operator in ("<", ">", "=", "!="):
                if operator != condition.operator and not (isinstance(condition.value, str) and operator in "<>"):
                    other = (
                        *self.conditions[:index],
                        replace(condition, operator=operator),
                        *self.conditions[index + 1 :],
                    )
                    near.append(replace(self, conditions=other))
        if len(self.conditions) == 2:
            near.append(replace(self, connective="OR" if self.connective == "AND" else "AND"))
        if self.aggregate and self.aggregate != "count":
            near += [replace(self, aggregate=name) for name in AGGREGATES if name != self.aggregate]
        if self.order:
            near += [replace(self, descending=not self.descending), replace(self, order="")]
        if self.limit:
            near += [replace(self, limit=0), replace(self, limit=self.limit + 1)]
        if self.distinct:
            near.append(replace(self, distinct=False))
        return near

    def _where(self, rng: random.Random) -> str:
        if not self.conditions:
            return ""
        joiner = f" {self.connective.lower()} "
        return f" {rng.choice(('where', 'where', 'when', 'if'))} " + joiner.join(c.words(rng) for c in self.conditions)

    def _superlative(self, rng: random.Random) -> str:
        return rng.choice(_SUPERLATIVES[self.aggregate])

    def _extreme(self, rng: random.Random) -> str:
        return rng.choice(_SUPERLATIVES["max" if self.descending else "min"])
