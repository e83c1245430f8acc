"""Every door is on the page: a format that is added without a word about it fails here."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from mlxlora_convert.export import export
from mlxlora_convert.formats import FORMATS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_documented(name: str) -> None:
    entry = FORMATS[name]
    table = (ROOT / "convert" / "README.md").read_text()
    row = next((line for line in table.splitlines() if line.startswith("|") and f"(`{name}`)" in line), "")
    assert row, f"convert/README.md has no row for `{name}`"
    written, read = row.split("|")[2].strip(), row.split("|")[3].strip()
    assert (written == "✓") == bool(entry.writer), f"convert/README.md is wrong about writing `{name}`"
    assert (read == "✓") == bool(entry.reader), f"convert/README.md is wrong about reading `{name}`"
    if entry.writer:
        page = (ROOT / "docs" / "export.md").read_text()
        line = next((line for line in page.splitlines() if line.startswith(f"| `{name}` |")), "")
        assert line, f"docs/export.md has no row for `{name}`"
        for group in entry.options:
            assert f"--{group}." in line, f"docs/export.md does not name the options --{group}.* of `{name}`"
        listed = next(line for line in (inspect.getdoc(export) or "").splitlines() if line.strip().startswith("to:"))
        assert name in re.split(r"[\s,()]+", listed), f"the help of --to does not name `{name}`"


def test_the_table_names_only_what_there_is() -> None:
    for line in (ROOT / "docs" / "export.md").read_text().splitlines():
        if line.startswith("| `") and not line.startswith("| `--to"):
            assert line.split("`")[1] in FORMATS
