"""Coverage-guided fuzzing of a reader (atheris, on libFuzzer): inputs that reach new branches are kept and mutated on.

    python -m tests.faults.fuzz_readers safetensors -runs=20000       libFuzzer's own flags follow the name

`hostile.py` says which readers there are and what each may do; a finding is written to `crash-…` in this folder's
place of work, and `python -m tests.faults.hostile` has a place for it as a seed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mlxlora", "mlxlora_convert"]):
    from tests.faults.hostile import LIMIT, limit_memory
    from tests.faults.targets import TARGETS


def main() -> None:
    """Fuzz the reader named first; the rest of the command line is libFuzzer's."""
    name = sys.argv.pop(1)
    target = TARGETS[name]
    folder = tempfile.TemporaryDirectory()
    place, corpus = Path(folder.name, "place"), Path(folder.name, "corpus")
    place.mkdir()
    corpus.mkdir()
    with atheris.instrument_imports(include=["mlxlora", "mlxlora_convert"]):
        seeds = target.seeds()
        count = len(seeds)
        for number, seed in enumerate(seeds):
            (corpus / f"seed-{number}").write_bytes(bytes([number]) + seed)
            path = target.put(place, number, seed)
            target.judge(path, target.read(path))  # also imports, instrumented, what the reader imports late

    def one(data: bytes) -> None:
        """The first byte says which of the reader's files the rest stands for."""
        index = data[0] % count if data else 0
        path = target.put(place, index, data[1:])
        begun = time.process_time()
        try:
            value = target.read(path)
        except target.refusals:
            pass
        else:
            target.judge(path, value)
        took = time.process_time() - begun
        assert took <= LIMIT, f"took {took:.1f} s"

    limit_memory()
    # libFuzzer's own clock is the wall's, which a busy machine makes slow: it is there for what never ends
    atheris.Setup([sys.argv[0], "-timeout=200", "-rss_limit_mb=4096", *sys.argv[1:], str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
