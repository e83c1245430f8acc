"""Every option of every verb changes what it should, and nothing else that is looked at."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

import pytest

from mlxlora.cli import VERBS
from tests.options import common, learning, using
from tests.options.calls import Views, parser_of
from tests.options.common import ELSEWHERE, NOTHING
from tests.options.place import Place
from tests.options.rows import PLAIN, Row
from tests.options.watch import see

ROWS = common.ROWS + learning.ROWS + using.ROWS

seen: dict[tuple[str, ...], Views] = {}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("options"))


def differing(one: Views, other: Views) -> set[str]:
    """The views that two commands are told apart by."""
    if ("refused" in one) != ("refused" in other):
        return {"refused"}
    return {name for name in {*one, *other} if one.get(name) != other.get(name)}


def options_of(verb: str) -> set[str]:
    """Every option of a verb by its dotted name; of a group that may be left out, its fields."""
    found = set()
    for action in parser_of(verb)[0]._actions:
        if action.dest in ("help", "config", "json", "print_shtab") or action.dest.endswith(".help"):
            continue
        groups = [kind for kind in get_args(getattr(action, "_typehint", None)) if is_dataclass(kind)]
        if groups:
            found |= {f"{action.dest}.{field.name}" for field in fields(groups[0])}
        else:
            found.add(action.dest)
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_is_forgotten(verb: str) -> None:
    known = {row.option for row in (*ROWS, *NOTHING) if row.verb == verb}
    known |= {option for of, option in ELSEWHERE if of == verb}
    assert known == options_of(verb)


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_a_test_that_is_named_exists(test: str) -> None:
    path, _, name = test.partition("::")
    assert f"\ndef {name}(" in (Path(__file__).parents[2] / path).read_text()


@pytest.mark.parametrize("row", ROWS + NOTHING, ids=[f"{row.verb}-{row.option}-{row.eye}" for row in ROWS + NOTHING])
def test_an_option_changes_what_it_should(row: Row, place: Place) -> None:
    if row.option == "report_to":
        pytest.importorskip("tensorboard")
    plain = {name: value for name, value in (PLAIN[row.verb] | row.given).items() if value is not None}
    key = (row.verb, row.eye, repr(plain))
    if key not in seen:
        seen[key] = see(place, row.verb, plain, row.eye)
    changed = see(place, row.verb, plain | {row.option: row.value}, row.eye)
    assert differing(seen[key], changed) == row.changes, (seen[key].get("refused"), changed.get("refused"))
