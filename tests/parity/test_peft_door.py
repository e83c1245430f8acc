"""`mlxlora export --to peft` with its check on: what PEFT itself says about the directory that we write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_convert.peft_export import to_peft

pytest.importorskip("torch", reason="pip install torch transformers peft")
pytest.importorskip("peft", reason="pip install torch transformers peft")

from mlxlora.adapters.files import read_adapter, save_adapter
from mlxlora.adapters.live import attach
from mlxlora.cli import main
from mlxlora.errors import MlxLoraError
from mlxlora.model import load_network
from mlxlora_convert import peft_adapter
from mlxlora_convert.export import export, import_
from mlxlora_convert.lowrank import LowRank
from mlxlora_convert.ours import BaseModel, from_lowrank
from tests import tiny

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def adapter(model: Path, out: Path) -> Path:
    base = BaseModel.open(str(model))
    parts = {}
    for number, (path, place) in enumerate(base.places.items()):
        if "_proj" in path:
            keys = mx.random.split(mx.random.key(number))
            a, b = place.factors(4)
            parts[path] = LowRank(
                place.kind, 0.2 * mx.random.normal(a, key=keys[0]), 0.2 * mx.random.normal(b, key=keys[1]), 2.0
            )
    return save_adapter(out, from_lowrank(parts, base))


def test_read_back_by_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.model_directory(tmp_path / "model", "qwen3")
    words = ["export", "--model", str(model), "--to", "peft", "--adapter", str(adapter(model, tmp_path / "a"))]
    assert main([*words, "--out", str(tmp_path / "p")]) == 0
    said = capsys.readouterr()
    assert "read back by PEFT, 64 tokens, max |Δ logprob|" in said.out
    result = export(str(model), "peft", tmp_path / "q", adapter=[str(tmp_path / "a")])
    assert result.check is not None and result.check.difference < 1e-4


def test_transformers_own_files_of_a_mixture(tmp_path: Path) -> None:
    model = tiny.transformers_directory(tmp_path / "model", "mixtral")
    result = export(str(model), "peft", tmp_path / "p", adapter=[str(adapter(model, tmp_path / "a"))])
    assert result.check is not None and result.check.difference < 1e-4


def test_an_export_that_reads_differently_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model_directory(tmp_path / "model", "llama")

    def wrong(*args: Any, **kwargs: Any) -> Any:
        state = to_peft(*args, **kwargs)
        state.config["lora_alpha"] *= 2
        return state

    monkeypatch.setattr(peft_adapter, "to_peft", wrong)
    with pytest.raises(MlxLoraError, match="not the same model"):
        export(str(model), "peft", tmp_path / "p", adapter=[str(adapter(model, tmp_path / "a"))])
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_base_that_transformers_cannot_read_is_written_for_it(family: str, tmp_path: Path) -> None:
    """Quantized, or experts in MLX's layout: read back through `--to hf`."""
    model = tiny.model_directory(tmp_path / "model", family, quantize={"bits": 8, "group_size": 32})
    result = export(str(model), "peft", tmp_path / "p", adapter=[str(adapter(model, tmp_path / "a"))])
    assert result.check is not None and result.check.difference < 1e-4
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_every_linear_layer_of_latent_attention(tmp_path: Path) -> None:
    """PEFT's own all-linear on a DeepSeek, with the one projection that mlx-lm splits: in, out again, and merged."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    model = tiny.transformers_directory(tmp_path / "model", "deepseek_v3")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    tokens = torch.arange(3, 40)[None]
    wanted = theirs(tokens).logits.detach().numpy()
    import_(tmp_path / "theirs", tmp_path / "ours", model=str(model))
    assert "model.layers.1.self_attn.kv_b_proj" in read_adapter(tmp_path / "ours").modules
    network, _ = load_network(model)
    attach(network, [str(tmp_path / "ours")])
    np.testing.assert_allclose(np.array(network(mx.array(tokens.numpy()))), wanted, atol=1e-5 * np.abs(wanted).max())
    for form, adapter in (("peft", "ours"), ("hf", "ours")):
        out = tmp_path / form
        result = export(str(model), form, out, adapter=[str(tmp_path / adapter)])
        assert result.check is not None and result.check.difference < 1e-4
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    np.testing.assert_allclose(merged(tokens).logits.detach().numpy(), wanted, atol=1e-5 * np.abs(wanted).max())
