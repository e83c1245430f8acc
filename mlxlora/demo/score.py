"""Execution accuracy: run the predicted and the gold SQL on the question's own rows, and compare what comes out.

Predicted SQL is not trusted: the connection may only read, in memory, with a short list of functions and a limit on
work.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

Row = tuple[str | int | float | None, ...]

MAX_STEPS = 200_000  # virtual machine instructions that a predicted query may run
MAX_ROWS = 1_000
_STEPS_PER_CALL = 1_000
_FUNCTIONS = {"count", "max", "min", "avg", "sum", "total", "abs", "round", "length", "lower", "upper"}
_ACTIONS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ}


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its name, its columns as (name, "text" or "number"), and its rows."""

    name: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str | int, ...], ...]

    def schema(self) -> str:
        """`Table name : column text , column number`, as a question shows it."""
        return f"Table {self.name} : " + " , ".join(f"{column} {kind}" for column, kind in self.columns)

    def position(self, column: str) -> int:
        """The index of a column in each row."""
        return [name for name, _ in self.columns].index(column)

    def named(self, kind: str) -> list[str]:
        """The columns of one kind."""
        return [name for name, of in self.columns if of == kind]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def open_tables(tables: Sequence[Table]) -> sqlite3.Connection:
    """An in-memory database that holds `tables` and refuses everything but bounded reading."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for table in tables:
        columns = ", ".join(
            f"{_quoted(name)} {'TEXT' if kind == 'text' else 'INTEGER'}" for name, kind in table.columns
        )
        connection.execute(f"CREATE TABLE {_quoted(table.name)} ({columns})")
        marks = ", ".join("?" * len(table.columns))
        connection.executemany(f"INSERT INTO {_quoted(table.name)} VALUES ({marks})", table.rows)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
    connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 2_000)
    connection.execute("PRAGMA query_only = ON")
    connection.set_authorizer(_authorize)
    calls = 0

    def stop_when_long() -> int:
        nonlocal calls
        calls += 1
        return int(calls > MAX_STEPS // _STEPS_PER_CALL)

    connection.set_progress_handler(stop_when_long, _STEPS_PER_CALL)
    return connection


def _authorize(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    allowed = action in _ACTIONS or (action == sqlite3.SQLITE_FUNCTION and second in _FUNCTIONS)
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def run_query(tables: Sequence[Table], sql: str) -> list[Row] | None:
    """The rows of one SELECT over `tables`; None when it fails, writes, runs too long or returns too much."""
    connection = open_tables(tables)
    try:
        rows = connection.execute(sql).fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
        return None
    finally:
        connection.close()
    return rows if len(rows) <= MAX_ROWS else None


def _comparable(row: Row) -> Row:
    return tuple(
        float(f"{value:.9g}") if isinstance(value, (int, float)) and math.isfinite(value) else value for value in row
    )


def results_agree(gold: list[Row] | None, predicted: list[Row] | None, *, ordered: bool) -> bool:
    """Whether two results are the same rows; in the same order where the gold query asks for one."""
    if gold is None or predicted is None:
        return False
    left, right = [_comparable(row) for row in gold], [_comparable(row) for row in predicted]
    return left == right if ordered else sorted(left, key=repr) == sorted(right, key=repr)


def is_right(tables: Sequence[Table], gold: str, predicted: str) -> bool:
    """Whether `predicted`, run on the tables, gives what `gold` gives."""
    return results_agree(run_query(tables, gold), run_query(tables, predicted), ordered="ORDER BY" in gold)
