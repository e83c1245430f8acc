"""Coverage-guided fuzzing of a reader (atheris, on libFuzzer): inputs that reach new branches are kept and mutated on.

    python -m tests.faults.fuzz_readers safetensors -runs=20000       libFuzzer's own flags follow the name

`hostile.py` says which readers there are and what each may do; a finding is written to `crash-…` in this folder's
place of work, and `python -m tests.faults.hostile` has a place for it as a seed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mlxlora", "mlxlora_convert"]):
    from mlxlora.errors import MlxLoraError

from tests.faults.hostile import TARGETS, limit_memory


def main() -> None:
    """Fuzz the reader named first; the rest of the command line is libFuzzer's."""
    name = sys.argv.pop(1)
    target = TARGETS[name]
    folder = tempfile.TemporaryDirectory()
    corpus, path = Path(folder.name, "corpus"), Path(folder.name, f"input{target.suffix}")
    corpus.mkdir()
    with atheris.instrument_imports(include=["mlxlora", "mlxlora_convert"]):
        for number, seed in enumerate(target.seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
            path.write_bytes(seed)
            target.judge(path, target.read(path))  # also imports, instrumented, what the reader imports late

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            value = target.read(path)
        except MlxLoraError:
            return
        target.judge(path, value)

    limit_memory()
    atheris.Setup([sys.argv[0], "-timeout=10", "-rss_limit_mb=4096", *sys.argv[1:], str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
