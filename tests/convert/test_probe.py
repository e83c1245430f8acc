"""What a check takes: a few tensors of ours at a time, and no more of the machine than it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora_convert import gguf_check, transformers_reader
from mlxlora_convert.export import export
from mlxlora_convert.jobs import ExportJob
from mlxlora_convert.probe import NotReadBack, Probe
from tests import tiny

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8}


def test_our_side_never_holds_the_model(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama", dtype=mx.float16, **WIDE)
    size = (directory / "model.safetensors").stat().st_size
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    seen = Probe(ExportJob(tmp_path / "out", str(directory))).log_probs
    assert seen.shape == (64, tiny.VOCABULARY)
    assert mx.get_peak_memory() - before < size  # in float32 the model takes twice that


@pytest.mark.parametrize("to", ["hf", "peft"])
def test_a_model_too_large_for_transformers_is_written_unchecked(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="pip install torch transformers peft")
    directory = tiny.model_directory(tmp_path / "model", "llama")
    adapter = [str(tiny.adapter_directory(tmp_path / "adapter", directory))]
    monkeypatch.setattr(transformers_reader, "machine_memory", lambda: 100_000)
    done = export(str(directory), to, tmp_path / "out", adapter=adapter)
    assert done.check is None and "this machine has 100.0 kB." in done.notes[-1]


def test_no_room_for_the_numbers_of_a_quantized_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"x" * 1000)
    monkeypatch.setattr(gguf_check, "free_space", lambda _: 1500)
    with pytest.raises(NotReadBack, match=r"may take 2\.0 kB, and 1\.5 kB are free"):
        gguf_check.from_file(tmp_path / "m.gguf", [1, 2])
