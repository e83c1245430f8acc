"""Same in, same out: the same seed gives the same bytes, looking and saving more often changes none, and runs leave
nothing behind in their process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxlora.files import sha256
from tests import tiny
from tests.faults import session

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"training.steps": 6, "training.batch_size": 2, "adapter.dropout": 0.1}
INTERVALS: list[dict[str, Any]] = [
    {"training.validate_every": 1, "training.save_every": 1, "training.keep": 1, "training.report_every": 1},
    {"training.validate_every": 5, "training.save_every": 4, "training.report_every": 3},
    {"training.report_every": 6, "samples.validation_split": 0.0},
]

RUNS = """
import json, sys
from pathlib import Path
from tests.faults import session
from tests.faults.surroundings import look
folder, count = Path(sys.argv[1]), int(sys.argv[2])
found = []
for number in range(count + 1):
    session.run(folder / "model", folder / "data.jsonl", folder / f"run-{number}", json.loads(sys.argv[3]))
    found.append(look())
changed = {k: [found[1][k], found[-1][k]] for k in found[1] if found[1][k] != found[-1][k]}
print(json.dumps(changed))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("same")
    tiny.model_directory(folder / "model", "qwen3")
    session.rows(folder / "data.jsonl")
    return folder


def adapter(run: Path) -> list[str]:
    return [sha256(run / "adapter" / name) for name in ("adapters.safetensors", "adapter_config.json", "manifest.json")]


def test_intervals_change_no_byte(place: Path) -> None:
    """The validation split takes the same rows away whether it is looked at once or six times."""
    session.run(place / "model", place / "data.jsonl", place / "plain", OPTIONS | INTERVALS[0])
    session.run(place / "model", place / "data.jsonl", place / "other", OPTIONS | INTERVALS[1])
    assert adapter(place / "plain") == adapter(place / "other")


def several(place: Path, count: int) -> None:
    """Runs in one process: the second and the last find the same surroundings; all adapters are equal."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNS, str(place), str(count), json.dumps(OPTIONS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {}
    adapters = {tuple(adapter(place / f"run-{number}")) for number in range(count + 1)}
    assert len(adapters) == 1
    print(f"{count + 1} runs in one process: one adapter, byte for byte; surroundings unchanged")


def test_runs_in_one_process_short(place: Path, tmp_path: Path) -> None:
    for name in ("model", "data.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    several(tmp_path, 2)


@pytest.mark.faults
def test_runs_in_one_process_long(place: Path, tmp_path: Path) -> None:
    for name in ("model", "data.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    several(tmp_path, 10)
