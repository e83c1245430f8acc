"""GGUF files under attack: the header alone, and a whole model on its way in."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

from tests import tiny
from tests.faults.sound import scratch


@functools.cache
def sound_gguf(kind: str) -> Path:
    from mlxlora_convert.gguf_file import export_gguf

    model = tiny.model_directory(scratch() / "gguf-model", "qwen3")
    return Path(export_gguf(model, scratch() / f"{kind}.gguf", type=kind).path)  # type: ignore[arg-type]


def gguf_seeds() -> list[bytes]:
    return [sound_gguf(kind).read_bytes() for kind in ("q8_0", "f16")]


def read_header(path: Path) -> Any:
    from mlxlora_convert.gguf_header import read_header

    return read_header(path)


def judge_header(path: Path, header: Any) -> None:
    """Every tensor lies inside of the file, and no two share a byte."""
    size, end = path.stat().st_size, 0
    for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.offset):
        assert end <= tensor.offset and tensor.offset + tensor.nbytes <= size, tensor
        end = tensor.offset + tensor.nbytes


def read_model(path: Path) -> Any:
    from mlxlora_convert.gguf_import import import_gguf

    out = path.parent / "imported"
    shutil.rmtree(out, ignore_errors=True)
    try:
        return import_gguf(path, out)
    finally:
        left = [p.name for p in path.parent.iterdir() if p.name.startswith(".imported")]
        assert not left, left


def judge_model(path: Path, done: Any) -> None:
    """What was published loads."""
    from mlxlora.model import load

    load(done.path if hasattr(done, "path") else path.parent / "imported", lazy=True)
