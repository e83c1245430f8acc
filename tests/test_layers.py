"""Imports go down only: cli, verbs, finetune, data/adapters/training/objectives, engine/model/tokenizer, errors."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# every room may import from rooms of a lower number, and from its own
LEVEL = {
    "errors": 0, "version": 0, "dtypes": 0, "commands": 0, "progress": 0, "parameters": 0, "terminal": 0,
    "files": 1, "memory": 1,
    "mlxlm": 2, "hub": 2, "architecture": 2, "checkpoint_names": 2,
    "tokenizer_file": 2, "sentencepiece_model": 2, "weights": 2, "probe": 2, "quantize": 3,
    "tokenizer": 3, "adapters": 3, "model": 4, "data": 5, "engine": 5,
    "objectives": 6, "training": 6, "prompts": 6, "generate": 6, "answers": 7, "reporting": 7, "finetune": 8,
}  # fmt: skip
VERBS = 9  # every other module of mlxlora: evaluate, generate, fuse, plan, demo, …
ALONE = {"flags": 9, "usage": 9, "cli": 10, "completion": 11, "__main__": 11, "__init__": 10}


def level(name: str) -> int:
    return ALONE.get(name, LEVEL.get(name, VERBS))


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_imports_go_down() -> None:
    wrong = []
    for path in sorted((ROOT / "mlxlora").rglob("*.py")):
        parts = path.relative_to(ROOT / "mlxlora").with_suffix("").parts
        room = parts[0]
        for name in imports(path):
            words = name.split(".")
            if words[0] == "mlxlora_convert" and room != "cli":
                wrong.append(f"{path.name} imports {name}: only cli may")
            if words[0] == "mlx_lm" and room != "mlxlm":
                wrong.append(f"{path.name} imports {name}: only mlxlm.py may")
            if words[0] == "mlxlora" and len(words) > 1 and words[1] != "__version__" and level(words[1]) > level(room):
                wrong.append(f"{path.relative_to(ROOT)} ({room}) imports {name}: upward")
    assert not wrong, "\n".join(wrong)


def test_no_test_imports_from_a_module_that_skips_itself() -> None:
    """Without PyTorch or llama.cpp such a module is skipped while it is imported, and its importer fails to collect."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    skipping = {path.stem for path in tests if "\npytest.importorskip" in path.read_text()}
    assert "test_gguf_vocabulary" in skipping
    wrong = [f"{path.name}: {name}" for path in tests for name in imports(path) if skipping & set(name.split("."))]
    assert not wrong, "\n".join(wrong)


def test_the_same_choices_are_listed_in_one_order() -> None:
    """`typing` keeps one object for equal unions: of two orders, a message shows the one that was imported first."""
    orders: dict[frozenset[str], set[tuple[str, ...]]] = {}
    for top in ("mlxlora", "convert"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
                    names = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
                    listed = tuple(map(ast.unparse, names))
                    orders.setdefault(frozenset(listed), set()).add(listed)
    assert len(orders) > 20
    assert not [found for found in orders.values() if len(found) > 1]
