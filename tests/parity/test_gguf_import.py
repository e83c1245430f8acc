"""GGUF files read here and by llama.cpp: the same log-probabilities, quantizations that MLX has not included."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.cli import main
from mlxlora.errors import MlxLoraError
from mlxlora.model import load_network
from mlxlora_convert.export import export
from mlxlora_convert.gguf_file import export_gguf
from mlxlora_convert.gguf_import import import_gguf
from mlxlora_convert.llamacpp import LlamaCpp
from mlxlora_convert.ollama_options import OllamaOptions
from mlxlora_convert.probe import log_probs
from tests import tiny

pytestmark = pytest.mark.parity
pytest.importorskip("xllamacpp", reason="pip install xllamacpp")

TOKENS = [(37 * i + 11) % tiny.VOCABULARY for i in range(20)]


def differences(directory: Path, file: Path) -> Any:
    ours = log_probs(load_network(directory)[0], TOKENS)
    with LlamaCpp(file, threads=1) as reader:
        return np.abs(ours - reader.log_probs(TOKENS, ours.shape[-1]))


def requantized(good: Path, target: Path, kind: str) -> Path:
    """The same file with random blocks of a quantization in place of its matrices."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.constants import GGML_QUANT_SIZES

    wanted = GGMLQuantizationType[kind]
    values, size = GGML_QUANT_SIZES[wanted]
    draw = np.random.default_rng(0)
    reader = GGUFReader(good)
    writer = GGUFWriter(target, "llama")
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if entry.types[0] == GGUFValueType.ARRAY:
            writer.add_array(name, entry.contents())
        else:
            writer.add_key_value(name, entry.contents(), entry.types[0])
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82), "IQ4_NL": (0,)}[kind]
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if data.ndim < 2:
            writer.add_tensor(tensor.name, data)
            continue
        blocks = draw.integers(0, 256, (data.shape[0], data.shape[1] // values, size), dtype=np.uint8)
        for at in scales:  # small scales, so that the numbers are those of weights
            blocks[:, :, at : at + 2] = np.frombuffer(np.float16(4e-5).tobytes(), np.uint8)
        writer.add_tensor(tensor.name, blocks.reshape(data.shape[0], -1), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_quantizations_that_mlx_has_not_become_numbers(tmp_path: Path, kind: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    directory = tiny.model_directory(tmp_path / "model", "llama", **sizes)
    good = export_gguf(directory, tmp_path / "good.gguf", type="f32").path
    file = requantized(good, tmp_path / "k.gguf", kind)
    done = import_gguf(file, tmp_path / "after", dtype="float32")
    assert done.kept == 0
    assert differences(tmp_path / "after", file).max() < 0.1  # llama.cpp rounds activations to 8 bits


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_kept_quantizations_give_llama_cpps_logits(tmp_path: Path, family: str, kind: Any) -> None:
    directory = tiny.model_directory(tmp_path / "model", family, hidden_size=64, num_hidden_layers=1)
    file = export_gguf(directory, tmp_path / "model.gguf", type=kind).path
    assert import_gguf(file, tmp_path / "after").kept > 5
    assert differences(tmp_path / "after", file).max() < 0.25  # llama.cpp rounds activations to 8 bits


def test_longrope(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 4.0, 7.0]}
    scaling = {"rope_type": "longrope", "type": "longrope", **factors, "original_max_position_embeddings": 32}
    changes: dict[str, Any] = {
        "rope_scaling": scaling,
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 512,
    }
    directory = tiny.model_directory(tmp_path / "model", "phi3", **changes)
    written = export_gguf(directory, tmp_path / "model.gguf", type="f32")
    # MLX takes the long factors whatever the length; llama.cpp does for contexts beyond the original one
    assert any("longrope" in note for note in written.notes)
    assert differences(directory, written.path).max() < 1e-5
    import_gguf(written.path, tmp_path / "after")
    assert (
        np.abs(
            log_probs(load_network(directory)[0], TOKENS) - log_probs(load_network(tmp_path / "after")[0], TOKENS)
        ).max()
        < 1e-5
    )


def test_the_language_model_of_a_multimodal_gemma(tmp_path: Path) -> None:
    import json

    from mlxlora.parameters import flat

    inner = tiny.config("gemma3_text", hidden_size=64)
    directory = tiny.model_directory(tmp_path / "model", "gemma3_text", hidden_size=64)
    text = tiny.network("gemma3_text", hidden_size=64)
    tensors = {f"language_model.{name}": value for name, value in flat(text.parameters()).items()}
    tensors.pop("language_model.lm_head.weight", None)
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, metadata={"format": "mlx"})
    outer = {"model_type": "gemma3", "text_config": inner, "vocab_size": tiny.VOCABULARY, "eos_token_id": 2}
    (directory / "config.json").write_text(json.dumps(outer))
    written = export_gguf(directory, tmp_path / "model.gguf", type="f32")
    assert differences(directory, written.path).max() < 6e-3  # GELU by table, see test_gguf.py


def test_import_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama")
    export_gguf(directory, tmp_path / "m.gguf", type="q8_0")
    assert main(["import", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "kept")]) == 0
    assert "16 of 21 tensors kept their quantization." in capsys.readouterr().out
    words = ["import", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "plain")]
    assert main([*words, "--gguf.dequantize", "true", "--gguf.dtype", "bfloat16"]) == 0
    assert "bfloat16" in (tmp_path / "plain" / "config.json").read_text()
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:5000])
    assert main(["import", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


def test_ollama_and_lm_studio_are_read_back(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "qwen3")
    done = export(str(directory), "ollama", tmp_path / "ollama", ollama=OllamaOptions(type="f16"))
    assert done.files == ("Modelfile", "model.gguf") and "read back by llama.cpp, 64 tokens" in str(done)
    words = ["export", "--model", str(directory), "--to", "lmstudio", "--out", str(tmp_path / "models/me/mine")]
    assert main([*words, "--lmstudio.form", "gguf"]) == 0
    assert (tmp_path / "models/me/mine/mine-Q8_0.gguf").is_file()


def test_mutated_files_never_crash_the_interpreter(tmp_path: Path) -> None:
    import random

    directory = tiny.model_directory(tmp_path / "model", "llama")
    good = export_gguf(directory, tmp_path / "good.gguf", type="q8_0").path.read_bytes()
    draw, accepted = random.Random(1), 0
    for number in range(150):
        data = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(20_000)] = draw.randrange(256)
        (tmp_path / "mutated.gguf").write_bytes(data)
        try:
            import_gguf(tmp_path / "mutated.gguf", tmp_path / f"after-{number}")
            accepted += 1
        except MlxLoraError as error:
            assert error.exit_code == 2
    assert accepted < 150
