"""The coverage-guided fuzz targets, for a bounded number of inputs; run them by hand for as long as you like."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.targets import TARGETS
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.mark.faults
@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_finds_nothing(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not there for this platform")
    flags = ["-runs=20000", "-max_len=4096", "-seed=1", "-max_total_time=40"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.faults.fuzz_readers", name, *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'convert'}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(name, done.stderr.strip().splitlines()[-1])
