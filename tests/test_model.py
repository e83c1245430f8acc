"""Model directories are read strictly, and what is wrong with one is named in full."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora import architecture, mlxlm, model, weights
from mlxlora.errors import ModelError, UnsupportedError
from mlxlora.parameters import flat
from tests import tiny

TOKENS = mx.array([[1, 70, 300, 5, 9, 41, 7]])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "mixtral", "deepseek_v3", "gpt2"])
def test_loads_what_mlx_lm_loads(tmp_path: Path, family: str) -> None:
    from mlx_lm.utils import load_model

    directory = tiny.model_directory(tmp_path / "m", family)
    network, _ = model.load_network(directory)
    theirs, _ = load_model(directory)
    assert type(network) is type(theirs)
    assert mx.array_equal(network(TOKENS), theirs(TOKENS))
    assert mx.array_equal(network(TOKENS), tiny.network(family)(TOKENS))


@pytest.mark.parametrize(
    "mode", [{"mode": "affine", "bits": 4}, {"mode": "mxfp4", "bits": 4}, {"mode": "nvfp4", "group_size": 16}]
)
def test_quantized_directories_load(tmp_path: Path, mode: dict[str, object]) -> None:
    directory = tiny.model_directory(tmp_path / "m", "llama", quantize=mode)
    network, config = model.load_network(directory)
    assert config["quantization"]["mode"] == mode["mode"]
    assert bool(mx.isfinite(network(TOKENS)).all())


def test_every_wrong_tensor_is_named(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "m", "llama")
    path = directory / "model.safetensors"
    tensors = tiny.tensors(path)
    del tensors["model.norm.weight"]
    tensors["model.stranger.weight"] = mx.zeros((2, 2))
    tensors["lm_head.weight"] = mx.zeros((7, 32))
    tensors["model.layers.0.mlp.up_proj.weight"] = mx.zeros((64, 32), mx.int32)
    mx.eval(tensors)
    path.unlink()
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(ModelError) as raised:
        model.load_network(directory)
    text = str(raised.value)
    assert "model.norm.weight: missing" in text
    assert "model.stranger.weight: in the weight files" in text
    assert "lm_head.weight: has shape [7, 32], the network needs [512, 32]" in text
    assert "up_proj.weight: holds int32, the network needs floating-point numbers" in text


def test_a_cut_off_shard_is_named(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "m", "llama")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        model.load_network(directory)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "m", "llama")
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        model.load_network(directory)


def test_unknown_architecture_names_the_nearest(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "m", "llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    with pytest.raises(UnsupportedError, match="Did you mean 'llama'"):
        model.load_network(directory)


def test_exit_inside_a_model_becomes_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx_lm.models.llama as llama

    def give_up(self: object, args: object) -> None:
        print("This model wants something else.")
        sys.exit(1)

    monkeypatch.setattr(llama.Model, "__init__", give_up)
    with pytest.raises(ModelError, match="something else"):
        mlxlm.build(tiny.config("llama"))


def test_own_code_runs_only_when_trusted(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "m", "llama")
    ran = tmp_path / "ran"
    code = (
        f"import pathlib\npathlib.Path({str(ran)!r}).write_text('')\nfrom mlx_lm.models.llama import Model, ModelArgs\n"
    )
    (directory / "own.py").write_text(code)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
    with pytest.raises(ModelError, match=r"own\.py"):
        model.load_network(directory)
    assert not ran.exists()
    network, loaded = model.load_network(directory, trust_remote_code=True)
    assert ran.exists() and loaded["model_file"] == "own.py"
    assert mx.array_equal(network(TOKENS), tiny.network("llama")(TOKENS))


def test_own_code_lies_inside_the_directory(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "m", "llama")
    (tmp_path / "evil.py").write_text("raise SystemExit")
    config = json.loads((directory / "config.json").read_text())
    for name in ("../evil.py", str(tmp_path / "evil.py"), 7, "absent.py"):
        (directory / "config.json").write_text(json.dumps({**config, "model_file": name}))
        with pytest.raises(ModelError, match="model_file"):
            model.load_network(directory, trust_remote_code=True)


def test_own_code_in_the_hubs_cache_is_a_link(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "0123"
    directory = tiny.model_directory(snapshot, "llama")
    blobs = tmp_path / "models--someone--tiny" / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    (directory / "own.py").symlink_to(blobs / "abc")
    (tmp_path / "evil.py").write_text("raise SystemExit")
    (directory / "evil.py").symlink_to(tmp_path / "evil.py")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
    model.load_network(directory, trust_remote_code=True)
    (directory / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    with pytest.raises(ModelError, match="outside"):
        model.load_network(directory, trust_remote_code=True)


def test_fingerprints_tell_models_apart(tmp_path: Path) -> None:
    one = tiny.model_directory(tmp_path / "a", "llama", seed=1)
    same = tiny.model_directory(tmp_path / "b", "llama", seed=1)
    other = tiny.model_directory(tmp_path / "c", "llama", seed=2)
    assert model.fingerprint(one) == model.fingerprint(same) != model.fingerprint(other)


def test_shards_are_written_in_order_and_emptied(tmp_path: Path) -> None:
    tensors = flat(tiny.network("llama").parameters())
    kept = {name: mx.array(tensor) for name, tensor in tensors.items()}
    paths = weights.write(tmp_path, tensors, shard_bytes=40_000)
    assert len(paths) > 2 and not tensors
    back = weights.read(tmp_path)
    assert back.keys() == kept.keys()
    assert all(mx.array_equal(back[name], kept[name]) for name in kept)


def test_importing_mlx_lm_keeps_the_process_limits() -> None:
    code = (
        "import resource\nbefore = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "from mlxlora import mlxlm\nmlxlm.module('utils')\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


NEW = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
       "original_max_position_embeddings": 128}  # fmt: skip


def test_rope_is_spelled_both_ways() -> None:
    config = {"model_type": "llama", "rope_parameters": dict(NEW)}
    spelled = architecture.spelled_both_ways(config)
    assert spelled["rope_theta"] == 5e5
    assert spelled["rope_scaling"]["rope_type"] == spelled["rope_scaling"]["type"] == "llama3"
    assert spelled["rope_scaling"]["factor"] == 8.0 and "rope_theta" not in spelled["rope_scaling"]
    old: dict[str, Any] = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {**NEW}}
    del old["rope_scaling"]["rope_theta"]
    back = architecture.spelled_both_ways(old)
    assert back["rope_parameters"] == NEW
    assert "rope_parameters" not in old
    assert architecture.spelled_both_ways(spelled) == spelled


def test_plain_rope_needs_no_scaling() -> None:
    spelled = architecture.spelled_both_ways({"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}})
    assert spelled["rope_theta"] == 3.0 and spelled["rope_scaling"] is None


def test_rope_by_kind_of_layer() -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    spelled = architecture.spelled_both_ways({"rope_parameters": parameters, "layer_types": kinds})
    assert spelled["rope_theta"] == 1e6 and spelled["rope_local_base_freq"] == 1e4
    assert spelled["rope_scaling"]["factor"] == 8.0 and spelled["sliding_window_pattern"] == 3


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("mistral", {"sliding_window": 64}, "window"),
        ("gemma2", {"sliding_window": 64}, "window"),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, "window"),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "longrope"),
        ("llama", {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "longrope"),
        ("deepseek_v32", {"index_topk": 64}, "choose the same 64"),
    ],
)
def test_silently_wrong_settings_are_known(family: str, changes: dict[str, object], word: str) -> None:
    assert word in architecture.silently_wrong(tiny.config(family, **changes))[0]
    assert not architecture.silently_wrong(tiny.config("llama"))


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "additional_chat_templates/tool.jinja"])
def test_links_out_of_a_model_are_not_copied(name: str, tmp_path: Path) -> None:
    """A model that somebody made may hold a link to a file of ours: what is written of it may be sent to others."""
    source, target = tiny.model_directory(tmp_path / "model"), tmp_path / "copy"
    target.mkdir()
    (tmp_path / "key").write_text("secret")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "key")
    with pytest.raises(ModelError, match=rf"{name}: is a link to .*key"):
        model.copy_files(source, target, (*model.TOKENIZER_FILES, *model.CARRIED))
    assert not list(target.iterdir())


def test_links_of_the_hubs_cache_are_copied(tmp_path: Path) -> None:
    snapshot, target = tmp_path / "models--a--b" / "snapshots" / "c", tmp_path / "copy"
    for folder in (snapshot, tmp_path / "models--a--b" / "blobs", target):
        folder.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs" / "d").write_text("free")
    (snapshot / "LICENSE").symlink_to("../../blobs/d")
    assert model.copy_files(snapshot, target, model.CARRIED) == ["LICENSE"]
    assert (target / "LICENSE").read_text() == "free" and not (target / "LICENSE").is_symlink()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rope_theta", "x", "must be a number, not 'x'"),
        ("rms_norm_eps", [1e-6], "must be a number"),
        ("max_position_embeddings", True, "must be a number"),
        ("layer_types", ["full_attention"] * 100_000, "100,000 entries"),
    ],
)
@pytest.mark.parametrize("inner", [False, True])
def test_settings_that_would_fail_late_are_refused(
    name: str, value: object, said: str, inner: bool, tmp_path: Path
) -> None:
    directory = tiny.model_directory(tmp_path / "m", "llama")
    config = json.loads((directory / "config.json").read_text())
    config |= {"text_config": {name: value}} if inner else {name: value}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{name}: .*{said}"):
        architecture.read_config(directory)
