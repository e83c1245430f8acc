"""LoRA adapters in GGUF, laid over their base by llama.cpp: the same log-probabilities as ours within 1e-4."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.adapters.files import Adapter, Module, save_adapter
from mlxlora.errors import AdapterError, UnsupportedError
from mlxlora.model import fingerprint, load
from mlxlora_convert.export import export
from mlxlora_convert.gguf_file import export_gguf
from mlxlora_convert.gguf_lora import export_gguf_lora
from mlxlora_convert.llamacpp import LlamaCpp
from mlxlora_convert.ours import BaseModel
from mlxlora_convert.probe import log_probs
from tests import tiny
from tests.parity import gelu_table

pytestmark = pytest.mark.parity
pytest.importorskip("xllamacpp", reason="pip install xllamacpp")

TOKENS = [(37 * i + 11) % tiny.VOCABULARY for i in range(20)]
SMOLLM3 = {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1], "no_rope_layer_interval": 4}
# family, changes to its configuration, what the adapter's paths contain, bound
CASES: list[tuple[str, dict[str, Any], tuple[str, ...], float]] = [
    ("llama", {}, ("_proj",), 1e-4),
    ("llama", {}, ("q_proj", "lm_head", "embed_tokens"), 1e-4),
    ("qwen3", {}, ("_proj",), 1e-4),
    ("qwen2", {}, ("layers.1.self_attn",), 1e-4),
    ("mixtral", {}, ("q_proj", "switch_mlp"), 1e-4),
    ("qwen2_moe", {}, ("_proj",), 1e-4),
    ("phi3", {}, ("_proj",), 1e-4),
    ("smollm3", SMOLLM3, ("_proj",), 1e-4),
    ("granite", {}, ("_proj",), 1e-4),
    ("cohere", {}, ("_proj",), 1e-4),
    # llama.cpp's GELU comes from a table; with the same one the bound is that of the others, see below
    ("gemma2", {"hidden_size": 64, "query_pre_attn_scalar": 20}, ("self_attn",), 2e-3),
    ("gemma3_text", {"hidden_size": 64}, ("_proj",), 2e-3),
    ("starcoder2", {}, ("self_attn", "c_fc"), 2e-3),
]


def adapter(directory: Path, target: Path, wanted: tuple[str, ...], *, kind: str = "lora") -> Path:
    """Random factors on every module whose path contains one of `wanted`; ranks and scales differ."""
    base = BaseModel.open(str(directory))
    modules = {}
    for number, (path, place) in enumerate(sorted(base.places.items())):
        if not any(word in path for word in wanted) or "gate_inp" in path or path.endswith(".gate"):
            continue
        rank = (2, 3, 4)[number % 3]
        keys = mx.random.split(mx.random.key(number), 3)
        a, b = (
            mx.random.normal(shape, key=key) * 0.3 for shape, key in zip(place.factors(rank), keys[:2], strict=True)
        )
        arrays = {"lora_a": a, "lora_b": b}
        if kind == "dora":
            arrays["m"] = mx.abs(mx.random.normal((place.shape[0],), key=keys[2]))
        modules[path] = Module(arrays, scale=(0.5, 8 / rank**0.5, 1.25)[number % 3])
    assert modules
    made = Adapter(kind, modules, layers=base.config["num_hidden_layers"], base=fingerprint(directory))
    return save_adapter(target, made)


@pytest.mark.parametrize(("family", "changes", "wanted", "bound"), CASES, ids=lambda value: str(value)[:30])
def test_llama_cpp_applies_it_as_we_do(
    tmp_path: Path, family: str, changes: dict[str, Any], wanted: tuple[str, ...], bound: float
) -> None:
    directory = tiny.with_logits(tiny.model_directory(tmp_path / "model", family, **changes), 0.25)
    made = adapter(directory, tmp_path / "adapter", wanted)
    base = export_gguf(directory, tmp_path / "base.gguf", type="f32")
    written = export_gguf_lora(f"{made}=0.7", str(directory), tmp_path / "adapter.gguf")
    assert written.modules and written.folded
    before = log_probs(load(directory).network, TOKENS)
    ours = log_probs(load(directory, adapter=[f"{made}=0.7"]).network, TOKENS)
    with LlamaCpp(base.path, adapter=written.path, threads=1) as reader:
        theirs = reader.log_probs(TOKENS, ours.shape[-1])
    assert np.abs(ours - before).max() > 0.1
    assert np.abs(ours - theirs).max() < bound


@pytest.mark.parametrize(("family", "logits"), [("gemma2", 4.0), ("gemma3_text", 1.0), ("starcoder2", 0.25)])
def test_the_gelu_table_is_the_only_difference(tmp_path: Path, family: str, logits: float) -> None:
    changes: dict[str, Any] = {"intermediate_size": 16} | ({"hidden_size": 64} if "gemma" in family else {})
    directory = tiny.with_logits(tiny.model_directory(tmp_path / "model", family, **changes), logits)
    made = adapter(directory, tmp_path / "adapter", ("self_attn", "mlp"))
    base = export_gguf(directory, tmp_path / "base.gguf", type="f32")
    written = export_gguf_lora(str(made), str(directory), tmp_path / "adapter.gguf")
    with LlamaCpp(base.path, adapter=written.path, threads=1) as reader:
        apart = gelu_table.apart(family, load(directory, adapter=[str(made)]).network, reader)
    assert np.quantile(apart, 0.75) < 1e-4
    assert max(apart) < 2e-3 * max(1.0, logits)  # a step of the table, here and there


def test_the_door_reads_it_back(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama")
    made = adapter(directory, tmp_path / "adapter", ("q_proj", "down_proj"))
    done = export(str(directory), "gguf-lora", tmp_path / "adapter.gguf", adapter=[str(made)])
    assert done.check is not None and done.check.difference < 1e-4
    assert "read back by llama.cpp, 64 tokens" in str(done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter.gguf", "model"]


def test_an_adapter_is_folded_into_the_model(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama")
    made = adapter(directory, tmp_path / "adapter", ("_proj",))
    done = export(str(directory), "gguf", tmp_path / "m.gguf", adapter=[f"{made}=0.5"])
    assert done.check is not None and done.check.difference < 0.1


def test_what_it_cannot_say(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama")
    dora = adapter(directory, tmp_path / "dora", ("q_proj",), kind="dora")
    with pytest.raises(UnsupportedError, match=r"cannot say DoRA\. Fold it into the model"):
        export_gguf_lora(str(dora), str(directory), tmp_path / "out.gguf")
    tied = tiny.model_directory(tmp_path / "tied", "qwen3")
    table = adapter(tied, tmp_path / "table", ("embed_tokens",))
    with pytest.raises(UnsupportedError, match="is the head of this model too"):
        export_gguf_lora(str(table), str(tied), tmp_path / "out.gguf")
    other = tiny.model_directory(tmp_path / "other", "llama", seed=1)
    plain = adapter(directory, tmp_path / "plain", ("q_proj",))
    with pytest.raises(AdapterError, match="base"):
        export_gguf_lora(str(plain), str(other), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
