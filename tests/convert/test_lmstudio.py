"""Models where LM Studio looks for them."""

from pathlib import Path

import pytest

from mlxlora.errors import ConfigError
from mlxlora_convert.export import export
from mlxlora_convert.gguf_header import read_header
from mlxlora_convert.lmstudio import names
from mlxlora_convert.lmstudio_options import LMStudioOptions
from tests import tiny


def test_gguf(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama")
    out = tmp_path / ".lmstudio" / "models" / "me" / "my-model"
    done = export(str(directory), "lmstudio", out, lmstudio=LMStudioOptions("gguf", "f16"), check=False)
    assert done.files == ("my-model-F16.gguf",) and "LM Studio shows it as me/my-model." in done.notes
    assert read_header(out / "my-model-F16.gguf").architecture == "llama"


def test_mlx(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama")
    done = export(str(directory), "lmstudio", tmp_path / "models" / "me" / "my-model")
    assert done.check is not None and done.check.reader == "mlx-lm"
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(done.files)


@pytest.mark.parametrize("place", ["models", "models/me", "models/my self/x", "models/me/.x"])
def test_a_place_where_lm_studio_would_not_look(tmp_path: Path, place: str) -> None:
    with pytest.raises(ConfigError, match=r"LM Studio"):
        names(tmp_path / place)
