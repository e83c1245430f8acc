"""Adapters of mlx-lm: made by mlx-lm itself and read here, made here and read by mlx-lm, and the layouts of old."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxlora import mlxlm
from mlxlora.adapters import AdapterConfig, collect
from mlxlora.adapters.files import Adapter, read_adapter, save_adapter
from mlxlora.adapters.live import attach
from mlxlora.cli import main
from mlxlora.errors import AdapterError, ConfigError, FormatError, InputError, UnsupportedError
from mlxlora.model import load_network
from mlxlora.parameters import flat
from mlxlora_convert.export import export, import_
from mlxlora_convert.lowrank import LowRank
from mlxlora_convert.mlxlm_options import MlxLmOptions
from mlxlora_convert.ours import BaseModel, from_lowrank
from tests import tiny

TOKENS = mx.array([[5, 17, 300, 2, 44, 260, 8, 99]])


def logits(network: nn.Module) -> np.ndarray:
    return np.array(network(TOKENS)[0])


def by_mlxlm(model: Path, out: Path, *, kind: str = "lora", layers: int = 2, **parameters: Any) -> np.ndarray:
    """An adapter as mlx-lm's trainer makes and saves it, with random numbers; returns mlx-lm's own logits with it."""
    network, _ = load_network(model)
    settings = {"rank": 4, "scale": 3.0, "dropout": 0.0, **parameters}
    network.freeze()
    mlxlm.module("tuner.utils").linear_to_lora_layers(network, layers, settings, use_dora=kind == "dora")
    for number, (name, array) in enumerate(flat(network.trainable_parameters()).items()):
        if not name.endswith(".m"):
            noise = 0.2 * mx.random.normal(array.shape, key=mx.random.key(number))
            network.load_weights([(name, noise)], strict=False)
    out.mkdir()
    mx.save_safetensors(str(out / "adapters.safetensors"), flat(network.trainable_parameters()))
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": settings, "model": "somewhere"}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return logits(network.eval())


def ours(model: Path, adapter: Path) -> np.ndarray:
    network, _ = load_network(model)
    attach(network, [str(adapter)])
    return logits(network)


def same(one: Adapter, two: Adapter) -> bool:
    return one.modules.keys() == two.modules.keys() and all(
        bool(mx.array_equal(array, two.modules[path].arrays[name]))
        for path, module in one.modules.items()
        for name, array in module.arrays.items()
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_directory(tmp_path_factory.mktemp("base") / "tiny-llama", "llama")


# ---- made by mlx-lm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"kind": "dora"}),
        ("llama", {"layers": 1, "keys": ["self_attn.q_proj", "mlp.up_proj"]}),
        ("llama", {"keys": ["self_attn.q_proj", "lm_head", "model.embed_tokens"]}),
        ("qwen3", {"keys": ["model.embed_tokens"]}),
        ("mixtral", {}),
        ("qwen3_moe", {"keys": ["mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj"]}),
    ],
)
@pytest.mark.parametrize("quantize", [None, {"bits": 4}])
def test_read_what_mlxlm_made(
    family: str, settings: dict[str, Any], quantize: dict[str, Any] | None, tmp_path: Path
) -> None:
    model = tiny.model_directory(tmp_path / "model", family, quantize=quantize)
    theirs = by_mlxlm(model, tmp_path / "theirs", **settings)
    (note,) = import_(tmp_path / "theirs", tmp_path / "ours", model=str(model)).notes
    assert note.startswith("The file says that it was made for 'somewhere'.")
    np.testing.assert_allclose(ours(model, tmp_path / "ours"), theirs, atol=1e-5)
    assert read_adapter(tmp_path / "ours").base == BaseModel.open(str(model)).fingerprint


def test_old_names(llama: Path, tmp_path: Path) -> None:
    """lora_layers for num_layers, use_dora for fine_tune_type: as until autumn 2024."""
    theirs = by_mlxlm(llama, tmp_path / "theirs", kind="dora")
    config = {"lora_layers": 2, "use_dora": True, "lora_parameters": {"rank": 4, "scale": 3.0, "keys": None}}
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    import_(tmp_path / "theirs", tmp_path / "ours", model=str(llama))
    np.testing.assert_allclose(ours(llama, tmp_path / "ours"), theirs, atol=1e-5)


def test_an_archive_without_configuration(llama: Path, tmp_path: Path) -> None:
    """adapters.npz, as in the first versions; the scale was in the program, so it must be told."""
    theirs = by_mlxlm(llama, tmp_path / "theirs")
    tensors = tiny.tensors(tmp_path / "theirs" / "adapters.safetensors")
    (tmp_path / "old").mkdir()
    mx.savez(str(tmp_path / "old" / "adapters.npz"), **tensors)
    with pytest.raises(AdapterError, match=r"does not say its scale.*--mlx_lm\.scale"):
        import_(tmp_path / "old", tmp_path / "ours", model=str(llama))
    assert not (tmp_path / "ours").exists()
    import_(tmp_path / "old", tmp_path / "ours", model=str(llama), mlx_lm=MlxLmOptions(scale=3.0))
    np.testing.assert_allclose(ours(llama, tmp_path / "ours"), theirs, atol=1e-5)
    import_(tmp_path / "old" / "adapters.npz", tmp_path / "file", model=str(llama), mlx_lm=MlxLmOptions(scale=3.0))
    assert same(read_adapter(tmp_path / "file"), read_adapter(tmp_path / "ours"))


def test_alpha_beside_scale_is_not_guessed(llama: Path, tmp_path: Path) -> None:
    by_mlxlm(llama, tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    old = {"lora_layers": 2, "lora_parameters": {"rank": 4, "alpha": 16.0, "scale": 10.0, "dropout": 0.0}}
    path.write_text(json.dumps(old))
    with pytest.raises(AdapterError, match=r"scale · alpha / rank = 40 until summer 2024 and with 10 after"):
        import_(tmp_path / "theirs", tmp_path / "ours", model=str(llama))
    import_(tmp_path / "theirs", tmp_path / "ours", model=str(llama), mlx_lm=MlxLmOptions(scale=40.0))
    assert read_adapter(tmp_path / "ours").modules["model.layers.0.self_attn.q_proj"].scale == 40.0
    path.write_text(json.dumps({**old, "fine_tune_type": "lora"}))  # of a time when alpha was ignored
    import_(tmp_path / "theirs", tmp_path / "later", model=str(llama))
    assert read_adapter(tmp_path / "later").modules["model.layers.0.self_attn.q_proj"].scale == 10.0


def test_flat_experts_of_old(tmp_path: Path) -> None:
    model = tiny.model_directory(tmp_path / "model", "mixtral")
    theirs = by_mlxlm(model, tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapters.safetensors"
    tensors = tiny.tensors(path)
    flat = {
        name: array.reshape(-1, array.shape[-1]) if array.ndim == 3 and name.endswith("lora_a") else array
        for name, array in tensors.items()
    }
    mx.eval(flat)
    mx.save_safetensors(str(path), flat)
    import_(tmp_path / "theirs", tmp_path / "ours", model=str(model))
    np.testing.assert_allclose(ours(model, tmp_path / "ours"), theirs, atol=1e-5)


# ---- made here ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize("quantize", [None, {"bits": 4}])
def test_written_for_mlxlm(family: str, quantize: dict[str, Any] | None, tmp_path: Path) -> None:
    wide: dict[str, Any] = (
        {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32} if family == "deepseek_v3" else {}
    )
    model = tiny.model_directory(tmp_path / "model", family, quantize=quantize, **wide)
    base = BaseModel.open(str(model))
    parts = {}
    for number, (path, place) in enumerate(base.places.items()):
        if (place.kind == "embedding" and quantize) or path.endswith(("kv_b_proj", "mlp.gate")):
            continue
        a, b = place.factors(2 + number % 3)
        keys = mx.random.split(mx.random.key(number))
        parts[path] = LowRank(
            place.kind, 0.2 * mx.random.normal(a, key=keys[0]), 0.2 * mx.random.normal(b, key=keys[1]), 1.0 + number % 2
        )
    save_adapter(tmp_path / "a", from_lowrank(parts, base))
    result = export(str(model), "mlx-lm", tmp_path / "out", adapter=[str(tmp_path / "a")], check=False)
    assert result.files == ("adapter_config.json", "adapters.safetensors")
    network, _ = load_network(model)
    plain = logits(network)
    mlxlm.load_adapters(network, tmp_path / "out")
    theirs = logits(network)
    assert np.abs(theirs - plain).max() > 1e-2
    np.testing.assert_allclose(ours(model, tmp_path / "a"), theirs, atol=1e-5 * max(1, float(np.abs(theirs).max())))


def test_what_mlxlm_cannot_carry_is_refused(stir: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny.model_directory(tmp_path / "model", "deepseek_v3")
    network, _ = load_network(model)
    stir(network, AdapterConfig(rank=2, targets=["kv_b_proj", "o_proj"]))
    save_adapter(tmp_path / "a", collect(network))
    with pytest.raises(
        UnsupportedError, match=r"layers\.0\.self_attn\.kv_b_proj and 1 more: .*mlxlora fuse.*without kv_b_proj"
    ):
        export(str(model), "mlx-lm", tmp_path / "out", adapter=[str(tmp_path / "a")])
    assert not (tmp_path / "out").exists()
    network, _ = load_network(model)
    stir(network, AdapterConfig(rank=2, targets=["mlp.gate"]))
    save_adapter(tmp_path / "router", collect(network))
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.gate: .*router.*without gate"):
        export(str(model), "mlx-lm", tmp_path / "out", adapter=[str(tmp_path / "router")])
    with pytest.raises(ValueError, match="kv_b_proj"):  # and mlx-lm itself does not take it for something else
        mlxlm.load_adapters(load_network(model)[0], tmp_path / "a")


# ---- wrong ----------------------------------------------------------------------------------------------------


def test_wrong_input(llama: Path, tmp_path: Path) -> None:
    by_mlxlm(llama, tmp_path / "good")
    tensors = tiny.tensors(tmp_path / "good" / "adapters.safetensors")
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    q = "model.layers.0.self_attn.q_proj"
    wrong: list[tuple[str, dict[str, Any], dict[str, mx.array], type[Exception]]] = [
        (rf"{q}\.lora_b: is missing", config, {k: v for k, v in tensors.items() if k != f"{q}.lora_b"}, AdapterError),
        ("lm_head.weight: is no part", config, {**tensors, "lm_head.weight": mx.zeros((512, 32))}, AdapterError),
        ("the model has no such module", config,
         {**tensors, "x.lora_a": mx.zeros((3, 4)), "x.lora_b": mx.zeros((4, 3))}, AdapterError),
        (rf"{q}\.lora_a: expected shape \[32, 4\], found \[33, 4\]", config,
         {**tensors, f"{q}.lora_a": mx.zeros((33, 4))}, AdapterError),
        ("expected rank 8", {**config, "lora_parameters": {"rank": 8, "scale": 1.0}}, tensors, AdapterError),
        ("scale: expected a number", {**config, "lora_parameters": {"rank": 4, "scale": 1e30}}, tensors, FormatError),
        ("fine_tune_type full", {**config, "fine_tune_type": "full"}, tensors, UnsupportedError),
        ("fine_tune_type: expected", {**config, "fine_tune_type": "what"}, tensors, FormatError),
        ("fine_tune_type: expected", {**config, "fine_tune_type": {"lora": 1}}, tensors, FormatError),
        ("is PEFT's", {"peft_type": "LORA"}, tensors, FormatError),
    ]  # fmt: skip
    for number, (message, settings, state, kind) in enumerate(wrong):
        folder = tmp_path / f"wrong{number}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        mx.save_safetensors(str(folder / "adapters.safetensors"), state)
        with pytest.raises(kind, match=message):
            import_(folder, tmp_path / "out", model=str(llama))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="within"):
        MlxLmOptions(scale=float("nan"))


def test_an_adapter_of_ours_is_not_bound_to_another_base(llama: Path, tmp_path: Path) -> None:
    made = tiny.adapter_directory(tmp_path / "made", llama)
    other = tiny.model_directory(tmp_path / "other", "llama", seed=1)
    with pytest.raises(ConfigError, match="was made by mlxlora and is bound to its base"):
        import_(made, tmp_path / "out", model=str(other))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 10, 500, -30])
def test_an_archive_cut_short(keep: int, llama: Path, tmp_path: Path) -> None:
    by_mlxlm(llama, tmp_path / "good")
    mx.savez(str(tmp_path / "whole.npz"), **tiny.tensors(tmp_path / "good" / "adapters.safetensors"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapters.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:keep])
    with pytest.raises(InputError):
        import_(tmp_path / "old", tmp_path / "out", model=str(llama), mlx_lm=MlxLmOptions(scale=1.0))


def test_an_archive_of_objects_is_not_unpickled(llama: Path, tmp_path: Path) -> None:
    objects: dict[str, Any] = {"x.lora_a": np.array([{}], dtype=object)}
    np.savez(tmp_path / "adapters.npz", **objects)
    with pytest.raises(FormatError, match="no numpy array"):
        import_(tmp_path / "adapters.npz", tmp_path / "out", model=str(llama), mlx_lm=MlxLmOptions(scale=1.0))


def test_options_of_another_format(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_mlxlm(llama, tmp_path / "a")
    words = ["--model", str(llama), "--out", str(tmp_path / "o")]
    assert main(["import", str(tmp_path / "a"), *words, "--format", "peft", "--mlx_lm.scale", "2"]) == 2
    assert "--format peft does not have them" in capsys.readouterr().err
    assert main(["export", "--to", "mlx-lm", "--adapter", str(tmp_path / "a"), *words, "--peft.base", "a/b"]) == 2
    assert "--to mlx-lm does not have them" in capsys.readouterr().err
