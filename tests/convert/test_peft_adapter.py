"""PEFT files through the verbs: out, in again, and everything that can be wrong with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora.adapters.files import Adapter, read_adapter, save_adapter
from mlxlora.cli import main
from mlxlora.errors import AdapterError, ConfigError, FormatError, InputError, UnsupportedError
from mlxlora_convert import base as bases
from mlxlora_convert.export import export, import_
from mlxlora_convert.lowrank import LowRank
from mlxlora_convert.names import Names
from mlxlora_convert.ours import BaseModel, from_lowrank
from mlxlora_convert.peft_config import PeftConfig
from mlxlora_convert.peft_export import PeftOptions
from mlxlora_convert.peft_import import from_peft
from tests import tiny

Change = Callable[[dict[str, Any], dict[str, mx.array]], Any]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_directory(tmp_path_factory.mktemp("base") / "tiny-llama", "llama")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(model, tmp_path_factory.mktemp("adapter") / "a", lambda path: "_proj" in path)


def made(model: Path, out: Path, chosen: Callable[[str], bool], *, dora: bool = False, **config: Any) -> Path:
    """An adapter of ours with random factors on the chosen modules."""
    base = BaseModel.open(str(model))
    parts = {}
    for number, (path, place) in enumerate(base.places.items()):
        if chosen(path):
            key = mx.random.split(mx.random.key(number), 3)
            a, b = place.factors(4)
            m = mx.random.uniform(0.5, 1.5, (place.shape[0],), key=key[2]) if dora else None
            parts[path] = LowRank(
                place.kind, mx.random.normal(a, key=key[0]), 0.1 * mx.random.normal(b, key=key[1]), 2.0, m
            )
    return save_adapter(out, from_lowrank(parts, base, dropout=0.1, config=config))


@pytest.fixture(scope="module")
def exported(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("peft") / "p"
    export(str(model), "peft", out, adapter=[str(adapter)], check=False)
    return out


def same(one: Adapter, two: Adapter) -> bool:
    return one.modules.keys() == two.modules.keys() and all(
        module.scale == two.modules[path].scale
        and module.arrays.keys() == two.modules[path].arrays.keys()
        and all(bool(mx.array_equal(array, two.modules[path].arrays[name])) for name, array in module.arrays.items())
        for path, module in one.modules.items()
    )


def damaged(exported: Path, out: Path, change: Change) -> Path:
    config = json.loads((exported / "adapter_config.json").read_text())
    tensors = tiny.tensors(exported / "adapter_model.safetensors")
    change(config, tensors)
    out.mkdir()
    (out / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(out / "adapter_model.safetensors"), tensors)
    return out


# ---- out and in again --------------------------------------------------------------------------------------


def test_out_and_in_again_is_bit_for_bit(model: Path, adapter: Path, exported: Path, tmp_path: Path) -> None:
    config = json.loads((exported / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    result = import_(exported, tmp_path / "back", model=str(model))
    assert result.format == "peft"
    assert same(read_adapter(adapter), read_adapter(tmp_path / "back"))


@pytest.mark.parametrize(
    ("base", "source", "named"),
    [
        ("tiny-llama", "", "org/tiny-llama"),
        ("tiny-llama", "", "/home/jo/models/Tiny_Llama-4bit/"),
        ("tiny-llama-4bit-mlx", "", "org/Tiny-Llama"),
        ("x", "org/tiny-llama", "other/tiny-llama-bnb-4bit"),
        ("models--org--tiny-llama/snapshots/0123abcd", "", "org/tiny-llama"),
        ("tiny-llama", "", "models--org--tiny-llama/snapshots/4567abcd"),
        ("tiny-llama", "", ""),
    ],
)
def test_a_base_of_the_same_name_is_no_news(
    base: str, source: str, named: str, model: Path, exported: Path, tmp_path: Path
) -> None:
    given = tmp_path / base
    shutil.copytree(model, given)
    if source:
        config = json.loads((given / "config.json").read_text())
        (given / "config.json").write_text(json.dumps({**config, "_name_or_path": source}))
    theirs = damaged(exported, tmp_path / "p", lambda config, _: config.update(base_model_name_or_path=named))
    assert import_(theirs, tmp_path / "out", model=str(given)).notes == ()


@pytest.mark.parametrize("named", ["org/tiny-llama-instruct", "org/tiny-llama-2", "C:\\models\\other"])
def test_another_base_of_the_same_shapes_is_told(named: str, model: Path, exported: Path, tmp_path: Path) -> None:
    theirs = damaged(exported, tmp_path / "p", lambda config, _: config.update(base_model_name_or_path=named))
    (note,) = import_(theirs, tmp_path / "out", model=str(model)).notes
    assert note.startswith(f"The file says that it was made for '{named}'. It fits tiny-llama by its shapes;")


def test_a_scale_on_the_way_out_is_folded_in(model: Path, adapter: Path, tmp_path: Path) -> None:
    export(str(model), "peft", tmp_path / "half", adapter=[f"{adapter}=0.5"], check=False)
    assert json.loads((tmp_path / "half" / "adapter_config.json").read_text())["lora_alpha"] == 4


def test_rslora_stays_rslora(model: Path, tmp_path: Path) -> None:
    adapter = made(model, tmp_path / "a", lambda path: "q_proj" in path, rslora=True)
    export(str(model), "peft", tmp_path / "p", adapter=[str(adapter)], check=False)
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["lora_alpha"] == 4  # 2.0 · √4
    import_(tmp_path / "p", tmp_path / "back", model=str(model))
    back = read_adapter(tmp_path / "back")
    assert same(read_adapter(adapter), back) and back.config["rslora"]


def test_dora(model: Path, tmp_path: Path) -> None:
    adapter = made(model, tmp_path / "a", lambda path: "q_proj" in path, dora=True)
    export(str(model), "peft", tmp_path / "p", adapter=[str(adapter)], check=False)
    import_(tmp_path / "p", tmp_path / "back", model=str(model))
    assert same(read_adapter(adapter), read_adapter(tmp_path / "back"))
    with pytest.raises(UnsupportedError, match="stronger or weaker"):
        export(str(model), "peft", tmp_path / "q", adapter=[f"{adapter}=0.5"], check=False)


def test_experts_by_the_order_of_sides_before_peft_0_18(tmp_path: Path) -> None:
    """Then lora_A of a stacked parameter [E, out, in] went over `out`: its update is Σ_r B[i, r, e] A[e, r, o]."""
    base = BaseModel.open(str(tiny.model_directory(tmp_path / "model", "mixtral")))
    holder, rank, count = "model.layers.0.mlp.experts", 2, 4
    keys = mx.random.split(mx.random.key(1))
    lora_a, lora_b = (
        mx.random.normal((rank * count, 128), key=keys[0]),
        mx.random.normal((32, rank * count), key=keys[1]),
    )
    raw = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": [], "target_parameters": ["gate_up_proj"]}
    tensors = {f"base_model.model.{holder}.lora_A.weight": lora_a, f"base_model.model.{holder}.lora_B.weight": lora_b}
    names = Names.of(base.config)
    adapter = from_peft(PeftConfig.read(raw), tensors, names, base.places, bases.tensors(base.network)).adapter
    moved = mx.einsum("ire,ero->eoi", lora_b.reshape(32, rank, count), lora_a.reshape(count, rank, 128)) * 3.0
    mlx = "model.layers.0.block_sparse_moe.switch_mlp"
    for part, expected in ((adapter[f"{mlx}.gate_proj"], moved[:, :64]), (adapter[f"{mlx}.up_proj"], moved[:, 64:])):
        assert mx.allclose(part.delta(), expected, atol=1e-4)


def test_no_path_of_this_machine_in_what_is_written(model: Path, adapter: Path, exported: Path, tmp_path: Path) -> None:
    written = b"".join(path.read_bytes() for path in exported.iterdir())
    assert str(model.parent).encode() not in written
    with pytest.raises(ConfigError, match="path of this machine"):
        PeftOptions(base=str(model))
    export(str(model), "peft", tmp_path / "p", adapter=[str(adapter)], check=False, peft=PeftOptions("org/name"))
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"


def test_a_quantized_base_and_a_tied_table(tmp_path: Path) -> None:
    base = tiny.model_directory(tmp_path / "q", "qwen3", quantize={"bits": 4})
    adapter = made(base, tmp_path / "a", lambda path: True)
    result = export(str(base), "peft", tmp_path / "p", adapter=[str(adapter)], check=False)
    assert any("tied to the output" in note for note in result.notes)
    import_(tmp_path / "p", tmp_path / "back", model=str(base))
    assert same(read_adapter(adapter), read_adapter(tmp_path / "back"))


def test_the_command_line(model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--model", str(model), "--to", "peft", "--adapter", str(adapter), "--out", str(tmp_path / "p")]
    assert main([*words, "--check", "false", "--peft.base", "org/name"]) == 0
    assert "Hugging Face PEFT adapter, 2 files" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "p"), "--model", str(model), "--out", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "peft"
    assert main(["import", str(tmp_path / "p"), "--out", str(tmp_path / "c")]) == 2
    assert "needs the base model" in capsys.readouterr().err


# ---- what cannot be written --------------------------------------------------------------------------------


def test_refused_on_the_way_out(model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="mlxlora merge"):
        export(str(model), "peft", tmp_path / "p", adapter=[str(adapter), str(adapter)], check=False)
    other = tiny.model_directory(tmp_path / "other", "llama", seed=3)
    with pytest.raises(AdapterError, match="made for tiny-llama"):
        export(str(other), "peft", tmp_path / "p", adapter=[str(adapter)], check=False)
    export(str(other), "peft", tmp_path / "any", adapter=[str(adapter)], check=False, any_base=True)
    base = BaseModel.open(str(model))
    full = Adapter("full", weights={"lm_head.weight": mx.zeros((512, 32))}, base=base.fingerprint)
    with pytest.raises(UnsupportedError, match="type full"):
        export(str(model), "peft", tmp_path / "p", adapter=[str(save_adapter(tmp_path / "f", full))], check=False)
    assert not (tmp_path / "p").exists()


# ---- what cannot be read -----------------------------------------------------------------------------------


def _drop(name: str) -> Change:
    return lambda config, tensors: tensors.pop(name)


def _set(**values: Any) -> Change:
    return lambda config, tensors: config.update(values)


def _tensor(name: str, value: mx.array) -> Change:
    return lambda config, tensors: tensors.update({name: value})


WRONG: dict[str, tuple[Change, type[Exception], str]] = {
    "missing B": (_drop(f"{Q}.lora_B.weight"), AdapterError, rf"{Q}.lora_A.weight: lora_B of this module is missing"),
    "missing module": (
        lambda config, tensors: [tensors.pop(f"{Q}.lora_{side}.weight") for side in "AB"],
        AdapterError,
        r"layers\.0\.self_attn\.q_proj\.lora_A\.weight: adapter_config\.json names this module",
    ),
    "extra tensor": (_tensor("base_model.model.what", mx.zeros(3)), AdapterError, "is no tensor of a LoRA adapter"),
    "foreign tensor": (_tensor("model.norm.weight", mx.zeros(3)), AdapterError, "does not begin with"),
    "unknown module": (
        lambda config, tensors: tensors.update(
            {f"{Q.replace('q_proj', 'qq_proj')}.lora_{side}.weight": mx.zeros((4, 32)) for side in "AB"}
        ),
        AdapterError,
        "the base has no module 'model.layers.0.self_attn.qq_proj' that can carry LoRA. Did you mean",
    ),
    "wrong shape": (
        _tensor(f"{Q}.lora_A.weight", mx.zeros((4, 33))),
        AdapterError,
        r"lora_A\.weight: expected shape \[4, 32\], found \[4, 33\]",
    ),
    "wrong rank": (_set(r=8, lora_alpha=16), AdapterError, r"expected shape \[8, 32\], found \[4, 32\]"),
    "integers": (_tensor(f"{Q}.lora_A.weight", mx.zeros((4, 32), mx.int32)), AdapterError, "found .*int32"),
    "embedding tensors on a linear layer": (
        lambda config, tensors: tensors.update(
            {f"{Q}.lora_embedding_{side}": tensors.pop(f"{Q}.lora_{side}.weight") for side in "AB"}
        ),
        AdapterError,
        "this module is a linear layer",
    ),
    "dora without magnitudes": (_set(use_dora=True), AdapterError, "no lora_magnitude_vector"),
    "magnitudes without dora": (
        _tensor(f"{Q}.lora_magnitude_vector", mx.ones(32)), AdapterError, "use_dora = False"
    ),
    "not LoRA": (_set(peft_type="LOHA"), UnsupportedError, "LOHA adapters are not LoRA"),
    "not finite": (
        _tensor(f"{Q}.lora_B.weight", mx.full((32, 4), float("nan"))), AdapterError, "not finite"
    ),
    "scale": (_set(lora_alpha=1e6), AdapterError, "expected a scale within"),
    "no type": (lambda config, tensors: config.pop("peft_type"), FormatError, "no peft_type"),
    "biases": (_set(bias="all"), UnsupportedError, "bias = 'all'"),
    "pissa": (_set(init_lora_weights="pissa_niter_4"), UnsupportedError, "changes the base's weights"),
    "replication": (_set(layer_replication=[[0, 1]]), UnsupportedError, "layers are repeated"),
    "tokens": (_set(trainable_token_indices=[1]), UnsupportedError, "single rows of the embedding"),
    "alora": (_set(alora_invocation_tokens=[1, 2]), UnsupportedError, "invocation sequence"),
    "rank 0": (_set(r=0), FormatError, "r: must be a whole number"),
    "rank text": (_set(rank_pattern={"q_proj": "4"}), FormatError, "rank_pattern"),
    "alpha": (_set(lora_alpha=1e30), FormatError, "lora_alpha"),
    "patterns": (_set(alpha_pattern={"(a+)+$": 3}), UnsupportedError, "too complex an expression"),
    "expression": (_set(alpha_pattern={"[": 3}), FormatError, "no regular expression"),
    "list": (_set(rank_pattern=[1]), FormatError, "rank_pattern: must be a dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named_and_nothing_is_written(name: str, model: Path, exported: Path, tmp_path: Path) -> None:
    change, kind, message = WRONG[name]
    wrong = damaged(exported, tmp_path / "wrong", change)
    with pytest.raises(kind, match=message):
        import_(wrong, tmp_path / "out", model=str(model))
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_file_cut_short(keep: int, model: Path, exported: Path, tmp_path: Path) -> None:
    wrong = damaged(exported, tmp_path / "wrong", lambda config, tensors: None)
    whole = (wrong / "adapter_model.safetensors").read_bytes()
    (wrong / "adapter_model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(FormatError):
        import_(wrong, tmp_path / "out", model=str(model))
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_not_opened(model: Path, exported: Path, tmp_path: Path) -> None:
    wrong = damaged(exported, tmp_path / "wrong", lambda config, tensors: None)
    (wrong / "adapter_model.safetensors").rename(wrong / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="pickle"):
        import_(wrong, tmp_path / "out", model=str(model))


def test_no_configuration(model: Path, exported: Path, tmp_path: Path) -> None:
    wrong = damaged(exported, tmp_path / "wrong", lambda config, tensors: None)
    (wrong / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        import_(wrong, tmp_path / "out", model=str(model))
    (wrong / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="does not exist"):
        import_(wrong, tmp_path / "out", model=str(model))
