"""`kill -9` inside saves: a published directory is whole at every moment, and the last adapter's bytes are the same."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxlora.files import check_safetensors, sha256
from mlxlora.training.checkpoint import read_checkpoint
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]


def start(path: Path, steps: int, megabytes: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.faults.saver", str(path), str(steps), str(megabytes)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def whole(path: Path) -> int:
    """Check everything that is published, as a reader would find it now. Returns the number of checkpoints."""
    owner = None
    checkpoints = sorted((path / "checkpoints").glob("step-*")) if (path / "checkpoints").exists() else []
    for checkpoint in checkpoints:
        owner = owner or json.loads((checkpoint / "manifest.json").read_text())["run"]
        read_checkpoint(checkpoint, owner)
    for name in ("adapter", "best"):
        if (path / name).exists():
            check_safetensors(path / name / "adapters.safetensors")
    if checkpoints:
        assert (path / "adapter").exists(), "a checkpoint is published, but no adapter"
    return len(checkpoints)


def scratch(path: Path) -> list[str]:
    return [p.name for p in path.rglob(".*.tmp-*")]


def kills(folder: Path, wanted: int, steps: int, megabytes: float, enough: float) -> None:
    calm = start(folder / "calm", steps, megabytes)
    output, _ = calm.communicate(timeout=PATIENCE)
    assert calm.returncode == 0, output
    chosen = random.Random(20)
    done = inside = runs = 0
    seconds = 0.3
    while done < wanted:
        run = folder / f"killed-{runs}"
        runs += 1
        finished = False
        while not finished:
            process = start(run, steps, megabytes)
            assert process.stdout is not None
            begun = time.monotonic()
            stop_after = chosen.randrange(1, 4)  # let one or two saves pass before the one that is hit
            for line in process.stdout:
                if line.startswith("saving"):
                    stop_after -= 1
                    begun = time.monotonic()
                    if not stop_after and done < wanted:
                        time.sleep(chosen.random() * seconds)
                        process.kill()
                elif line.startswith("saved"):
                    seconds = 0.8 * seconds + 0.2 * (time.monotonic() - begun)
            code = process.wait()
            process.stdout.close()
            finished = code == 0
            if not finished:
                assert code == -9, code
                done += 1
                inside += bool(scratch(run))
                whole(run)
                finished = json.loads((run / "run.json").read_text())["finished"]  # hit between its end and its exit
        assert not scratch(run), scratch(run)
        for name in ("adapter", "best"):
            assert sha256(run / name / "adapters.safetensors") == sha256(
                folder / "calm" / name / "adapters.safetensors"
            )
    print(
        f"{done} kills in {runs} runs, {inside} of them inside a save of {megabytes:g} MB ({seconds * 1000:.0f} ms):"
        " every published directory whole, every last adapter equal byte for byte"
    )
    assert inside >= enough * wanted, "too few kills met a save"


def test_kills_inside_saves_short(tmp_path: Path) -> None:
    kills(tmp_path, wanted=4, steps=6, megabytes=12, enough=0)  # of four, chance and load may let all miss


@pytest.mark.faults
def test_kills_inside_saves_long(tmp_path: Path) -> None:
    kills(tmp_path, wanted=100, steps=12, megabytes=72, enough=0.4)
