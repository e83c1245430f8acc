"""The tables of docs/train.md, from the option classes and their field docstrings: python -m tests.option_tables"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
GROUPS = {
    "samples": ("mlxlora/data/config.py", "SamplesConfig"),
    "adapter": ("mlxlora/adapters/config.py", "AdapterConfig"),
    "optimizer": ("mlxlora/training/optimizer.py", "OptimizerConfig"),
    "training": ("mlxlora/training/config.py", "TrainingConfig"),
}
UNSAID = ("None", "field(default_factory=list)", "field(default_factory=dict)")


def fields(path: str, name: str) -> list[tuple[str, str, str]]:
    """(name, default, docstring) of every field of a dataclass, read without importing it."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name).body
    found = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        said = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            said = " ".join(str(after.value.value).split())
        default = ast.unparse(node.value) if node.value else ""
        found.append((node.target.id, "" if default in UNSAID else default.strip("'"), said))
    return found


def table(group: str) -> str:
    """One group as Markdown."""
    lines = [f"### `--{group}.*`", "", "| option | default | what it does |", "|---|---|---|"]
    for name, default, said in fields(*GROUPS[group]):
        lines.append(f"| `{name}` | {f'`{default}`' if default else ''} | {said.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(map(table, GROUPS)))
