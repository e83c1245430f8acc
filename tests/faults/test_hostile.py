"""Damaged files, in a process of their own, so that a crash of the interpreter is seen and named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.targets import TARGETS
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
SHORT = 60
LONG = 2500  # for each reader: more than 10,000 in all


def attack(first: int, count: int, *names: str) -> None:
    """Feed each reader `count` damaged files, in one process; a crash or a hang names the last file that was read."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.hostile", str(first), str(first + count), *names]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'convert'}"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"does not come to an end; last: {(error.stderr or b'').decode()[-200:]}")
    last = done.stderr.strip().splitlines()[-1:]
    assert done.returncode == 0, f"exit {done.returncode} at {last}:\n{done.stdout}\n{done.stderr[-2000:]}"
    assert done.stdout.count("damaged files") == len(names)
    print(done.stdout.strip())


def test_damaged_files_short() -> None:
    attack(0, SHORT, *TARGETS)


@pytest.mark.faults
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_long(name: str) -> None:
    attack(1000, LONG, name)
