"""`--to mlx`: what stock mlx-lm loads is what we fused or converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlxlora import mlxlm
from mlxlora.adapters.files import save_adapter
from mlxlora.errors import ConfigError
from mlxlora.model import load_network
from mlxlora_convert.export import export
from mlxlora_convert.lowrank import LowRank
from mlxlora_convert.mlx_options import MlxOptions
from mlxlora_convert.ours import BaseModel, from_lowrank
from tests import tiny


def adapter(model: Path, out: Path) -> Path:
    import mlx.core as mx

    base = BaseModel.open(str(model))
    parts = {}
    for number, (path, place) in enumerate(base.places.items()):
        if "q_proj" in path:
            a, b = place.factors(2)
            keys = mx.random.split(mx.random.key(number))
            parts[path] = LowRank(place.kind, mx.random.normal(a, key=keys[0]), mx.random.normal(b, key=keys[1]), 0.1)
    return save_adapter(out, from_lowrank(parts, base))


@pytest.mark.parametrize("quantize", [None, {"bits": 8}])
def test_fused_and_read_back_by_mlxlm(quantize: dict[str, Any] | None, tmp_path: Path) -> None:
    model = tiny.model_directory(tmp_path / "model", "qwen3", quantize=quantize)
    result = export(str(model), "mlx", tmp_path / "out", adapter=[str(adapter(model, tmp_path / "a"))])
    assert result.check is not None and result.check.reader == "mlx-lm" and result.check.difference < 1e-5
    assert any("KL" in note for note in result.notes)
    network, config = load_network(tmp_path / "out")
    assert ("quantization" in config) == (quantize is not None)
    assert mlxlm.total_parameters(network) == mlxlm.total_parameters(load_network(model)[0])


def test_without_adapters_it_is_converted(tmp_path: Path) -> None:
    model = tiny.model_directory(tmp_path / "model", "llama")
    result = export(str(model), "mlx", tmp_path / "out")
    assert result.check is not None and "config.json" in result.files
    with pytest.raises(ConfigError, match="none was given"):
        export(str(model), "mlx", tmp_path / "other", mlx=MlxOptions(bits=4))
