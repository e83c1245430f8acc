"""What is told to install can be installed, and what the code reads is in the package."""

import ast
import re
import sys
import tomllib
from pathlib import Path

from mlxlora.reporting.trackers import TRACKERS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources() -> list[Path]:
    return [*(ROOT / "mlxlora").rglob("*.py"), *(ROOT / "convert").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]


def test_what_is_imported_is_asked_for() -> None:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    names = {re.split(r"[\[<>=; ]", line)[0].replace("-", "_") for lines in groups for line in lines}
    names |= {"yaml", "google"} if {"pyyaml", "protobuf"} <= names else set()  # what these two are imported as
    imported = {
        name.split(".")[0]
        for folder in ("mlxlora", "convert")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in named(node)
    }
    assert imported - set(sys.stdlib_module_names) - {"mlxlora", "mlxlora_convert"} - names == set()


def named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module] if node.module and not node.level else []
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_extras_that_messages_name_exist() -> None:
    named = {
        extra
        for path in [*sources(), ROOT / "README.md", ROOT / "convert" / "README.md"]
        for match in re.findall(r"mlxlora\[([a-z0-9,-]+)\]", path.read_text())
        for extra in match.split(",")
    }
    assert {"parquet", "datasets"} <= named
    assert (named | set(TRACKERS)) - PROJECT["project"]["optional-dependencies"].keys() == set()


def test_files_that_are_no_code_are_packaged() -> None:
    listed = PROJECT["tool"]["setuptools"]["package-data"]
    for package, folder in {
        "mlxlora": ROOT / "mlxlora",
        "mlxlora_convert": ROOT / "convert" / "mlxlora_convert",
    }.items():
        packaged = {path for pattern in listed[package] for path in folder.glob(pattern)}
        there = {
            path
            for path in folder.rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")
        }
        assert there - packaged == set()


def test_targets_that_are_named_exist() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", text, re.M))
    assert set(re.findall(r"make ([a-z]+)  ", text)) <= targets
    assert set(re.findall(r"^make ([a-z]+)", (ROOT / ".ci" / "run").read_text(), re.M)) <= targets
