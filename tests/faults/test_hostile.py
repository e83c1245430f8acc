"""Damaged files, in a process of their own, so that a crash of the interpreter is seen and named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.targets import TARGETS

ROOT = Path(__file__).parents[2]
SHORT = 60
LONG = 2500  # for each reader: more than 10,000 in all


def attack(name: str, first: int, count: int) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.faults.hostile", name, str(first), str(first + count)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'convert'}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    last = done.stderr.strip().splitlines()[-1:] if done.stderr else []
    assert done.returncode == 0, f"{name}: exit {done.returncode} at file {last}:\n{done.stdout}\n{done.stderr[-2000:]}"
    print(done.stdout.strip())
    return done.stdout


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_short(name: str) -> None:
    attack(name, 0, SHORT)


@pytest.mark.faults
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_long(name: str) -> None:
    attack(name, 1000, LONG)
