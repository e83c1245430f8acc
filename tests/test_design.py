"""docs/design.md and the code say the same: which modules there are, and in which order they may import each other."""

import itertools
import re
from pathlib import Path

import pytest

from tests.test_layers import LEVEL, VERBS, level

ROOT = Path(__file__).parent.parent
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
ROOMS = dict(re.findall(r"^### `([a-z_/]+)/`\n(.*?)(?=^##)", DESIGN, re.M | re.S))
PACKAGES = [
    path.parent.relative_to(ROOT).as_posix()
    for top in ("mlxlora", "convert/mlxlora_convert")
    for path in (ROOT / top).rglob("__init__.py")
]


@pytest.mark.parametrize("package", sorted({*PACKAGES, *ROOMS}))
def test_the_modules_of_a_room_are_these(package: str) -> None:
    named = set(re.findall(r"`([a-z0-9_*]+\.py)`", ROOMS[package]))
    there = {path.name for path in (ROOT / package).glob("*.py")} - ({"__init__.py"} if package != "mlxlora" else set())
    unnamed = {name for name in there if not any(Path(name).match(pattern) for pattern in named)}
    gone = {pattern for pattern in named if not any(Path(name).match(pattern) for name in there)}
    assert not unnamed, f"docs/design.md does not name these modules of {package}: {sorted(unnamed)}"
    assert not gone, f"docs/design.md names modules of {package} that are not there: {sorted(gone)}"


def test_the_order_of_imports_is_the_one_that_is_held() -> None:
    line = re.search(r"`cli` → verbs.*`errors`", DESIGN, re.S)
    assert line is not None
    steps = [re.findall(r"`(\w+)`|\b(verbs)\b", step) for step in line[0].split("→")]
    levels = [
        {VERBS if verbs else level(name) for name, verbs in step}
        for step in steps
        if all(verbs or name in LEVEL or name == "cli" for name, verbs in step) and step
    ]
    assert len(levels) >= 8
    for above, below in itertools.pairwise(levels):
        assert min(above) >= max(below), line[0]
