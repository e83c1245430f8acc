"""Predicted SQL is run, but it can only read, and not for long."""

import time

import pytest

from mlxlora.demo.score import MAX_ROWS, Table, is_right, open_tables, run_query

SHIPS = Table("ships", (("vessel", "text"), ("crew", "number")), (("Argo", 50), ("Beagle", 74), ("Argo", 12)))
MANY = Table("many", (("n", "number"),), tuple((n,) for n in range(400)))


def test_the_same_result_is_right_however_it_is_written() -> None:
    gold = "SELECT vessel FROM ships WHERE crew > 40"
    assert is_right([SHIPS], gold, "select vessel from ships where not crew <= 40 order by crew desc")
    assert not is_right([SHIPS], gold, "SELECT vessel FROM ships")
    assert not is_right([SHIPS], gold, "SELECT crew FROM ships WHERE crew > 40")
    assert not is_right([SHIPS], gold, "That is the vessel of ships where crew is above 40.")
    assert not is_right([SHIPS], gold, "")


def test_order_is_part_of_an_ordered_answer() -> None:
    gold = "SELECT crew FROM ships ORDER BY crew"
    assert is_right([SHIPS], gold, "SELECT crew FROM ships ORDER BY crew ASC")
    assert not is_right([SHIPS], gold, "SELECT crew FROM ships ORDER BY crew DESC")


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM ships",
        "DROP TABLE ships",
        "INSERT INTO ships VALUES ('x', 1)",
        "UPDATE ships SET crew = 1",
        "CREATE TABLE other (a)",
        "CREATE TEMP TABLE other (a)",
        "ATTACH DATABASE 'other.db' AS other",
        "PRAGMA query_only = OFF",
        "PRAGMA table_info(ships)",
        "VACUUM INTO 'copy.db'",
        "SELECT 1; DELETE FROM ships",
        "SELECT load_extension('x')",
        "SELECT randomblob(100000000)",
        "SELECT zeroblob(100000000)",
        "SELECT printf('%1000000d', 1)",
        "BEGIN",
        "SELECT vessel FROM nowhere",
        "SELECT '\x00'",
        "SELECT " + "1 + " * 5_000 + "1",
    ],
)
def test_nothing_but_reading_is_run(sql: str) -> None:
    assert run_query([SHIPS], sql) is None


def test_a_refused_statement_changes_nothing() -> None:
    connection = open_tables([SHIPS])
    with pytest.raises(Exception, match=r"not authorized|prohibited|readonly"):
        connection.execute("DELETE FROM ships")
    assert connection.execute("SELECT count(*) FROM ships").fetchall() == [(3,)]
    connection.close()


@pytest.mark.parametrize(
    "sql",
    [
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        "SELECT count(*) FROM many a, many b, many c, many d, many e",
        "SELECT * FROM many a, many b, many c ORDER BY a.n * b.n",
    ],
)
def test_endless_queries_are_stopped(sql: str) -> None:
    start = time.thread_time()  # others may keep the machine busy
    assert run_query([MANY], sql) is None
    assert time.thread_time() - start < 5


def test_a_flood_of_rows_is_no_answer() -> None:
    assert run_query([MANY], "SELECT a.n FROM many a, many b") is None
    assert len(run_query([MANY], "SELECT n FROM many") or []) == 400 < MAX_ROWS
