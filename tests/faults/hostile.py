"""Feed damaged files to every reader: none may crash, hang, take memory without bound, or believe a lie.

    python -m tests.faults.hostile 0 1000 safetensors gguf     damage number 0 to 999, for each of these readers

A reader may return or raise what mlxlora raises on purpose; anything else is a defect. What a reader accepts is
handed on to a judge, one that we did not write where there is one. A reader's time is the processor's: that others
work on the same machine, or that this process is stopped for a while, makes no reader slow.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.faults.mutate import mutate
from tests.faults.targets import TARGETS

LIMIT = 10.0  # seconds of the processor that one file may take
MEMORY = 6 << 30  # bytes of address space beyond what is in use when the readers begin


def attack(name: str, first: int, last: int) -> dict[str, int]:
    """Damage files number `first` to `last - 1` for one reader. Prints the number of each before it is read."""
    target = TARGETS[name]
    seeds = target.seeds()
    counts = {"refused": 0, "accepted": 0, "defects": 0}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for index, seed in enumerate(seeds):  # the sound ones pass
            path = target.put(Path(folder), index, seed)
            target.judge(path, target.read(path))
        for number in range(first, last):
            print(name, number, file=sys.stderr, flush=True)
            index = number % len(seeds)
            path = target.put(Path(folder), index, mutate(seeds[index], number))
            start = time.process_time()
            try:
                value = target.read(path)
            except target.refusals:
                counts["refused"] += 1
            except BaseException as error:
                counts["defects"] += 1
                print(f"{name} {number}: {type(error).__module__}.{type(error).__name__}: {str(error)[:300]}")
                if isinstance(error, KeyboardInterrupt):
                    raise
            else:
                counts["accepted"] += 1
                try:
                    target.judge(path, value)
                except Exception as error:
                    counts["defects"] += 1
                    print(f"{name} {number}: accepted, but {type(error).__name__}: {str(error)[:300]}")
            took = time.process_time() - start
            slowest = max(slowest, took)
            if took > LIMIT:
                counts["defects"] += 1
                print(f"{name} {number}: took {took:.1f} s")
    print(f"{name}: {last - first} damaged files, {counts}, slowest {slowest * 1000:.0f} ms")
    return counts


def limit_memory() -> None:
    """A reader that believes a length of terabytes shall fail here, not take the machine with it."""
    import resource

    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


if __name__ == "__main__":
    limit_memory()
    first, last = map(int, sys.argv[1:3])
    sys.exit(1 if sum(attack(name, first, last)["defects"] for name in sys.argv[3:]) else 0)
