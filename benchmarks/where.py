"""Where a step of the engine spends its time, by Linux's perf: in products, moving matrices for them, or elsewhere.

python benchmarks/where.py [SCENARIO]      with the environment that the Makefile gives to `make bench`
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.contestants import enter
from benchmarks.scenarios import PRODUCTS, SCENARIOS

STEPS = 6
PARTS = {"products": "gemm_kernel", "moving matrices for them": "gemm_"}  # by what is in a symbol; the first that fits


def main() -> None:
    """Print the shares."""
    scenario = SCENARIOS[sys.argv[1] if len(sys.argv) > 1 else "chat"]
    contestant = enter(PRODUCTS, scenario, mx.float32)
    contestant.answer()
    contestant.step()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/perf.data"
        perf = subprocess.Popen(
            ["perf", "record", "-F", "999", "-o", file, "-p", str(os.getpid())], stderr=subprocess.DEVNULL
        )
        time.sleep(1.5)  # until it is attached
        for _ in range(STEPS):
            contestant.step()
        perf.send_signal(signal.SIGINT)
        perf.wait()
        report = ["perf", "report", "-i", file, "--stdio", "--sort", "sym"]
        said = subprocess.run(report, capture_output=True, text=True, check=True).stdout
    shares = dict.fromkeys([*PARTS, "elsewhere"], 0.0)
    for line in said.splitlines():
        share, _, symbol = line.strip().partition("%")
        if symbol:
            part = next((part for part, name in PARTS.items() if name in symbol), "elsewhere")
            shares[part] += float(share)
    for part, percent in shares.items():
        print(f"{percent:5.1f} %  {part}")


if __name__ == "__main__":
    main()
