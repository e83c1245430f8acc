"""How much memory an export to GGUF takes beside the size of the model: python -m benchmarks.export_memory

A llama of random weights is written to a temporary folder, and each export and import runs in a process of its own.
Told is by how much the process grew while it worked, after the same had been done to a tiny model. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

CASES = (("float16", None, "f16"), ("float16", None, "q8_0"), ("4 bits", {"bits": 4, "group_size": 32}, "q4_1"))
WORK = """
import sys
from pathlib import Path
from benchmarks.resident import forget_peak, peak, resident
from mlxlora_convert.gguf_file import export_gguf
from mlxlora_convert.gguf_import import import_gguf
small, large, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
out = large.parent / f"{large.name}-{kind}"
out.mkdir()
export_gguf(small, out / "small.gguf", type=kind)
import_gguf(out / "small.gguf", out / "small")
forget_peak()
start = resident()
export_gguf(large, out / "large.gguf", type=kind)
written = peak()
forget_peak()
again = resident()
import_gguf(out / "large.gguf", out / "large")
print(written - start, peak() - again)
"""


def model(path: Path, width: int, layers: int, quantize: dict[str, Any] | None) -> Path:
    """A model directory that is opened and written as one of a user."""
    from tests import tiny

    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return tiny.model_directory(path, "llama", quantize, dtype=mx.float16, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=6, help="its blocks")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each case")
    given = parser.parse_args()
    for stored, quantize, kind in CASES:
        with tempfile.TemporaryDirectory(prefix="export-memory-") as folder:
            small = model(Path(folder) / "small", 32, 1, quantize)
            large = model(Path(folder) / "model", given.width, given.layers, quantize)
            size = (large / "model.safetensors").stat().st_size
            command = [sys.executable, "-c", WORK, str(small), str(large), kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        export, both = map(int, done.stdout.split())
        if given.json:
            print(json.dumps({"stored": stored, "type": kind, "model": size, "export": export, "import": both}))
        else:
            print(f"{stored} to {kind}: model {size / 1e6:.0f} MB, export +{export / 1e6:.0f} MB, "
                  f"import +{both / 1e6:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
