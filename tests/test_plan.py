"""`mlxlora plan`: what it says of this machine, of another, and of one that is too small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxlora.errors import ConfigError
from mlxlora.plan import other_machine, plan
from mlxlora.training.config import TrainingConfig
from tests import tiny


def test_the_verb(tmp_path: Path) -> None:
    tiny.model_directory(tmp_path / "model", "llama")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(30):
            file.write(json.dumps({"text": f"number {number} " * (3 + number)}) + "\n")
    given = str(tmp_path / "model"), [str(tmp_path / "rows.jsonl")]
    options: dict[str, Any] = {"training": TrainingConfig(epochs=2, batch_size=2)}
    here = plan(*given, **options)
    assert here.seconds and here.tokens_per_second
    assert "the fastest, and it fits" in str(here) and "about" in str(here)
    assert here.table[8192]["products"] > here.table[512]["products"]
    assert here.table[8192]["products"] > here.table[8192]["inputs"]
    there = plan(*given, for_="M2 16GB", **options)
    assert there.machine == "M2 16GB" and there.seconds is None and there.limit < 12e9
    small = plan(*given, memory_limit="1.2MB", **options)
    assert small.seconds is None and "does not fit" in str(small)


@pytest.mark.parametrize("text", ["M2", "16", "M2 2GB", ""])
def test_unknown_machines_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="M2 16GB"):
        other_machine(text)
