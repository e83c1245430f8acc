"""`mlxlora plan`: what it says of this machine, of another, and of one that is too small."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlxlora.adapters import AdapterConfig
from mlxlora.errors import ConfigError
from mlxlora.plan import other_machine, plan
from mlxlora.training.config import TrainingConfig
from mlxlora.training.optimizer import OptimizerConfig
from mlxlora.tune import tune
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


def test_what_a_model_falls_back_to_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notes that `train` gives; and rows beyond those that are tried, of a model that keeps tokens × tokens."""
    module = sys.modules["mlxlora.plan"]  # the verb has its name
    monkeypatch.setattr(module, "CONTEXTS", (128, 256, 512, 1024, 2048))
    monkeypatch.setattr(module, "LONG", 256)
    tiny.model_directory(tmp_path / "model", "deepseek_v3")
    rows = tiny.chats(tmp_path / "rows.jsonl", 12)
    found = plan(str(tmp_path / "model"), [str(rows)], training=TrainingConfig(checkpoint_blocks="products"))
    assert "note: attention keeps tokens × tokens for each head" in str(found)
    less = found.tried[-1].resident
    grown = [found.table[length]["products"] - less for length in (512, 1024, 2048)]
    assert grown[1] > 2.5 * grown[0] and grown[2] > 3.5 * grown[1]


def test_what_train_refuses_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    pointless: dict[str, Any] = {
        "adapter": AdapterConfig(type="full"),
        "optimizer": OptimizerConfig(lora_plus_ratio=4.0),
    }
    verbs: list[Any] = [plan, partial(tune, out=tmp_path / "out")]
    for verb in verbs:
        with pytest.raises(ConfigError, match="no lora_b"):
            verb(str(tmp_path / "no-model"), [str(tmp_path / "no-rows")], **pointless)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("M2", '"M2 16GB"'),
        ("16GB", '"M2 16GB"'),
        ("", '"M2 16GB"'),
        ("M2 2GB", "M2 come with 8 GB, 16 GB, 24 GB"),
        ("M3 Pro 32GB", "M3 Pro come with 18 GB, 36 GB"),
        ("M3 Por 36GB", "Did you mean 'M3 Pro'"),
        ("RTX 4090 24GB", "--memory_limit 12GB"),
        ("M2 16TB", '"M2 16GB"'),
    ],
)
def test_unknown_machines_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        other_machine(text)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "name", "told"),  # what Metal tells on such a Mac, in MiB: lines of llama.cpp's logs
    [
        ("m1 16 GB", "M1 16GB", 10922.67),
        ("Apple M2 Max, 32GB", "M2 Max 32GB", 21845.33),
        ("M4 Max 36GB", "M4 Max 36GB", 28991.03e6 / 2**20),
        ("M1 Max 64GB", "M1 Max 64GB", 49152.0),
        ("M2-Max 96GiB", "M2 Max 96GB", 73728.0),
    ],
)
def test_other_macs_have_what_metal_tells_there(text: str, name: str, told: float) -> None:
    found, limit = other_machine(text)
    assert found == name and limit == pytest.approx(0.9 * told * 2**20, rel=1e-4)
