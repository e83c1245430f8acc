"""`kill -9` at any moment of a run: the same call goes on by itself, and arrives at the same bytes."""

import contextlib
import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mlxlora.adapters import read_adapter
from mlxlora.files import sha256
from mlxlora.training.checkpoint import read_checkpoint
from tests import tiny
from tests.faults import session

COMMON = {"training.steps": 12, "training.save_every": 3, "training.validate_every": 4, "training.batch_size": 2}
VARIANTS: list[dict[str, Any]] = [
    {"optimizer.name": "adamw", "adapter.dropout": 0.1, "training.accumulate": 4, "training.epochs": None},
    {"optimizer.name": "adam", "optimizer.schedule": "constant"},
    {"optimizer.name": "adamw", "samples.packing": True, "optimizer.schedule": "linear", "training.accumulate": 2},
    {"optimizer.name": "adafactor", "adapter.dropout": 0.1, "training.checkpoint_blocks": "inputs"},
    {"optimizer.name": "lion", "adapter.type": "dora", "optimizer.schedule": "cosine-restarts"},
    {"optimizer.name": "muon", "training.tokens_per_batch": 128, "training.batch_size": None, "adapter.rank": 8},
    {"optimizer.name": "sgd", "training.seed": 3, "training.accumulate": 4, "adapter.targets": ["attention"]},
]


def whole(out: Path) -> None:
    """Everything that is published can be read, and is what its manifest says."""
    if not (out / "run.json").exists():
        return
    identity = json.loads((out / "run.json").read_text())
    assert identity["format"] == 1
    for checkpoint in (out / "checkpoints").glob("step-*"):
        read_checkpoint(checkpoint, json.loads((checkpoint / "manifest.json").read_text())["run"])
    for name in ("adapter", "best"):
        if (out / name).exists():
            read_adapter(out / name)


def finished(out: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return bool(json.loads((out / "run.json").read_text())["finished"])
    return False


def kills(folder: Path, variants: list[dict[str, Any]], wanted: int) -> None:
    model, data = tiny.model_directory(folder / "model", "qwen3"), session.rows(folder / "data.jsonl")
    chosen = random.Random(7)
    total = sessions = 0
    for number, variant in enumerate(variants):
        options = COMMON | variant
        calm = folder / f"calm-{number}"
        begun = time.monotonic()
        process = session.start(model, data, calm, options)
        process.join()
        assert process.exitcode == 0, options
        seconds = time.monotonic() - begun
        share = wanted * (number + 1) // len(variants)
        attempt = 0
        while total < share:
            out = folder / f"killed-{number}-{attempt}"
            attempt += 1
            while not finished(out):
                process = session.start(model, data, out, options)
                sessions += 1
                # early kills first, later ones as the run gets on; past the share it may finish in peace
                process.join(timeout=chosen.uniform(0.1, 1.1) * seconds if total < share else None)
                if process.exitcode is None:
                    process.kill()
                    process.join()
                    total += 1
                else:
                    assert process.exitcode == 0, options
                process.close()
                whole(out)
            for name in ("adapter", "best"):
                for file in ("adapters.safetensors", "adapter_config.json", "manifest.json"):
                    assert sha256(out / name / file) == sha256(calm / name / file), (options, name, file)
            assert session.told(out) == session.told(calm), options
            assert not list(out.rglob(".*.tmp-*"))
    print(
        f"{total} kills in {sessions} sessions of {len(variants)} kinds of runs: adapter/ and best/ equal byte for byte"
        " to the run never killed, metrics.jsonl equal event for event"
    )


def scratch(out: Path) -> list[Path]:
    """What a save leaves behind that did not come to its end."""
    return list(out.rglob(".*.tmp-*"))


def kills_inside(folder: Path, wanted: int, rank: int, **sizes: Any) -> None:
    """Whole runs again, each killed as soon as it is seen to save, at any moment of that."""
    model, data = tiny.model_directory(folder / "model", "qwen3", **sizes), session.rows(folder / "data.jsonl")
    options = COMMON | {"adapter.rank": rank, "training.save_every": 1, "training.steps": 8, "adapter.dropout": 0.1}
    calm = folder / "calm"
    process = session.start(model, data, calm, options)
    process.join()
    assert process.exitcode == 0
    saved = [sum(file.stat().st_size for file in one.iterdir()) for one in (calm / "checkpoints").iterdir()]
    chosen = random.Random(11)
    total = inside = runs = 0
    seconds = 0.02
    while total < wanted:
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        runs += 1
        while not finished(out):
            process = session.start(model, data, out, options)
            begun = 0.0
            while process.exitcode is None and total < wanted:
                if scratch(out) and not begun:
                    begun = time.monotonic()
                    time.sleep(chosen.random() * seconds)
                    process.kill()
                    process.join()
                    total += 1
                    inside += bool(scratch(out))
                    # as long as a save turns out to take: longer while all of them are met
                    seconds *= 1.2 if scratch(out) else 0.8
                time.sleep(0.001)
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
            process.close()
            whole(out)
        assert session.told(out) == session.told(calm) and not scratch(out)
        for name in ("adapter", "best"):
            assert sha256(out / name / "adapters.safetensors") == sha256(calm / name / "adapters.safetensors")
    print(
        f"{total} kills in {runs} runs of `finetune`, {inside} of them inside a save of {min(saved) / 1e6:.0f} MB:"
        " adapter/ and best/ equal byte for byte to the run never killed, metrics.jsonl equal event for event"
    )
    assert inside >= 0.4 * wanted, "too few kills met a save"


def test_kills_short(tmp_path: Path) -> None:
    kills(tmp_path, [{"adapter.dropout": 0.1, "training.steps": 6, "training.save_every": 2}], wanted=2)


@pytest.mark.faults
def test_kills_long(tmp_path: Path) -> None:
    kills(tmp_path, VARIANTS, wanted=140)


@pytest.mark.faults
def test_kills_inside_large_saves_long(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    kills_inside(tmp_path, wanted=90, rank=160, **sizes)
