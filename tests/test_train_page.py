"""docs/train.md tells every option as the code does."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_tables_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("train_options", DOCS / "train_options.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "train.md").read_text(encoding="utf-8")
    for group in module.GROUPS:
        assert module.table(group) in page, f"{group}: paste the output of python docs/train_options.py"


def test_what_may_change_on_resume_is_what_the_code_lets_change() -> None:
    from mlxlora.training.identity import FREE

    part = (DOCS / "train.md").read_text(encoding="utf-8").split("## What may change")[1].split("\n## ")[0]
    assert [name for name in FREE if f"`{name.partition('.')[2]}`" not in part and f"`{name}`" not in part] == []
