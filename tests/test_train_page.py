"""docs/train.md tells every option as the code does."""

from pathlib import Path

from mlxlora.training.identity import FREE
from tests.option_tables import GROUPS, table

DOCS = Path(__file__).parent.parent / "docs"


def test_the_tables_are_those_of_the_code() -> None:
    page = (DOCS / "train.md").read_text(encoding="utf-8")
    for group in GROUPS:
        assert table(group) in page, f"{group}: paste the output of python -m tests.option_tables"


def test_what_may_change_on_resume_is_what_the_code_lets_change() -> None:
    part = (DOCS / "train.md").read_text(encoding="utf-8").split("## What may change")[1].split("\n## ")[0]
    assert [name for name in FREE if f"`{name.partition('.')[2]}`" not in part and f"`{name}`" not in part] == []
