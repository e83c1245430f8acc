"""Adapters carried to PEFT and back: transformers + PEFT and we say the same logits, in both directions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install torch transformers peft")
peft = pytest.importorskip("peft", reason="pip install torch transformers peft")
transformers = pytest.importorskip("transformers", reason="pip install torch transformers peft")

from mlxlora import architecture, mlxlm  # noqa: E402
from mlxlora.adapters import weights  # noqa: E402
from mlxlora.adapters.inject import get_module  # noqa: E402
from mlxlora.errors import AdapterError, UnsupportedError  # noqa: E402
from mlxlora.model import load_network  # noqa: E402
from mlxlora_convert import base as bases  # noqa: E402
from mlxlora_convert.lowrank import LowRank, Place  # noqa: E402
from mlxlora_convert.names import Names  # noqa: E402
from mlxlora_convert.peft_config import PeftConfig  # noqa: E402
from mlxlora_convert.peft_export import PeftOptions, to_peft  # noqa: E402
from mlxlora_convert.peft_import import Imported, from_peft  # noqa: E402
from tests import tiny  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # PEFT and torch warn about much that is none of ours
]
FAMILIES = ["llama", "qwen3", "gemma3", "phi3", "mixtral", "gpt2", "deepseek_v3", "qwen3_moe", "gpt_oss"]
MOE = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]
TOKENS = [[5, 17, 300, 2, 44, 260, 8, 99, 123, 77, 31, 200]]


CHANGES: dict[str, dict[str, Any]] = {
    "gemma3": {"hidden_size": 64},  # mlx-lm rounds √hidden_size to bfloat16; that of 64 is exact
    # mlx-lm ignores yarn's "truncate", which transformers takes by default
    "gpt_oss": {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}


class Base:
    """One tiny model, as transformers and as mlx-lm load it from the same files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config = json.loads((path / "config.json").read_text())
        if config["model_type"] == "qwen3_moe":  # the name that the published files have and mlx-lm reads
            (path / "config.json").write_text(json.dumps({**config, "num_experts": config["num_local_experts"]}))

    def torch_model(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    def network(self) -> nn.Module:
        config = json.loads((self.path / "config.json").read_text())
        if config["model_type"] not in ("gpt2", "gpt_oss"):
            return load_network(self.path)[0]
        network = mlxlm.build(architecture.spelled_both_ways(config))
        state = tiny.tensors(self.path / "model.safetensors")
        if config["model_type"] == "gpt2":
            state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        else:
            state = dict(map(_gpt_oss, state.items()))
        network.load_weights(list(network.sanitize(state).items()))
        return network.eval()

    def names(self) -> Names:
        return Names.of(json.loads((self.path / "config.json").read_text()))


def _gpt_oss(item: tuple[str, mx.array]) -> tuple[str, mx.array]:
    """Experts as mlx-lm expects them: [out, in], and with a name for the weight."""
    name, tensor = item
    if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
        return f"{name}.weight", tensor.swapaxes(1, 2)
    return name, tensor


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Base]:
    made: dict[str, Base] = {}

    def base(family: str, **changes: Any) -> Base:
        changes = {**CHANGES.get(family, {}), **changes}
        key = f"{family}{changes}"
        if key not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                path = tmp_path_factory.mktemp(family)
                made[key] = Base(tiny.transformers_directory(path, family, **changes))
        return made[key]

    return base


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits[0].float().numpy()


def our_logits(network: nn.Module, adapter: dict[str, LowRank]) -> np.ndarray:
    """Logits of the network with the adapter folded into its float32 weights, computed here from the definition."""
    for path, part in adapter.items():
        module = get_module(network, path)
        split = module if isinstance(module, weights.Heads) else None
        grown = (weights.dense(split) if split is not None else module.weight) + part.delta()
        if part.magnitude is not None:
            grown = grown * (part.magnitude / mx.linalg.norm(grown, axis=1))[:, None]
        if split is None:
            module.weight = grown
        else:
            for name, array in split.apart(grown).items():
                split.halves[name].weight = array
    return np.array(network(mx.array(TOKENS))[0])


def assert_same(ours: np.ndarray, theirs: np.ndarray, plain: np.ndarray) -> None:
    assert np.abs(theirs - plain).max() > 1e-2, "the adapter must matter for the comparison to mean something"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(np.abs(theirs).max())))


def trained(model: Any, config: Any, seed: int = 0) -> Any:
    """A PEFT model whose adapter weights are random, as if it had been trained."""
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0, 0.2)
            elif "modules_to_save.default" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped.eval()


def read_back(base: Base, directory: Path) -> Imported:
    network = base.network()
    config = PeftConfig.read(json.loads((directory / "adapter_config.json").read_text()))
    state = tiny.tensors(directory / "adapter_model.safetensors")
    return from_peft(config, state, base.names(), bases.places(network), bases.tensors(network))


def check_import(base: Base, config: Any, directory: Path) -> Imported:
    """PEFT trains and saves; we read; both say the same."""
    plain = torch_logits(base.torch_model())
    model = trained(base.torch_model(), config)
    model.save_pretrained(directory)
    imported = read_back(base, directory)
    assert_same(our_logits(base.network(), imported.adapter), torch_logits(model), plain)
    return imported


def check_export(base: Base, adapter: dict[str, LowRank], directory: Path, **options: Any) -> None:
    """We write; PEFT loads; both say the same. And what we read back from it is what we wrote."""
    network = base.network()
    places = bases.places(network)
    state = to_peft(adapter, base.names(), places, PeftOptions(**options))
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(state.config))
    mx.save_safetensors(str(directory / "adapter_model.safetensors"), state.tensors, metadata={"format": "pt"})
    model = base.torch_model()
    plain = torch_logits(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, directory).eval()
    assert not [str(warning.message) for warning in seen if "missing" in str(warning.message).lower()]
    ours = our_logits(network, adapter)
    assert_same(ours, torch_logits(model), plain)
    assert_same(our_logits(base.network(), read_back(base, directory).adapter), ours, plain)


def random_adapter(
    places: dict[str, Place], chosen: Callable[[str, Place], bool], **settings: Any
) -> dict[str, LowRank]:
    """Random factors on the chosen modules; `rank(path)` and `scale(path)` may be given."""
    key = mx.random.key(1)
    adapter = {}
    for path, place in places.items():
        if not chosen(path, place):
            continue
        key, one, two = mx.random.split(key, 3)
        a, b = place.factors(settings.get("rank", lambda path: 4)(path))
        scale = settings.get("scale", lambda path: 2.0)(path)
        adapter[path] = LowRank(
            place.kind, 0.2 * mx.random.normal(a, key=one), 0.2 * mx.random.normal(b, key=two), scale
        )
    return adapter


def inside(path: str, place: Place) -> bool:
    return ".layers." in path or ".h." in path


def linear_inside(path: str, place: Place) -> bool:
    return inside(path, place) and ("attn" in path or ".mlp.c_" in path)


# ---- PEFT to us ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "patterns", "layers"])
def test_import(family: str, variant: str, base_of: Callable[..., Base], tmp_path: Path) -> None:
    fused = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj"], "gpt2": ["c_attn", "c_fc", "c_proj"]}
    split = (
        ["q_proj", "o_proj"]
        if family != "deepseek_v3"
        else ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    )
    common: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": fused.get(family, split)}
    last = common["target_modules"][-1]
    extra: dict[str, dict[str, Any]] = {
        "lora": {},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "patterns": {"rank_pattern": {last: 2}, "alpha_pattern": {rf".*\.1\..*{last}": 5, last: 3}},
        "layers": {"layers_to_transform": [1]},
    }
    config = peft.LoraConfig(**common, **extra[variant], fan_in_fan_out=family == "gpt2")
    imported = check_import(base_of(family), config, tmp_path / "adapter")
    ranks = {part.rank for part in imported.adapter.values()}
    assert ranks == ({2, 4} if variant == "patterns" else {4})
    if variant == "layers":
        assert not any(".0." in path for path in imported.adapter)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mixtral"])
def test_import_embeddings_and_head(family: str, base_of: Callable[..., Base], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head", "q_proj"])
    imported = check_import(base_of(family), config, tmp_path / "adapter")
    assert {"model.embed_tokens", "lm_head"} <= imported.adapter.keys()


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("chosen", ["both", "up", "down"])
def test_import_stacked_experts(family: str, chosen: str, base_of: Callable[..., Base], tmp_path: Path) -> None:
    parameters = {"both": ["gate_up_proj", "down_proj"], "up": ["gate_up_proj"], "down": ["down_proj"]}[chosen]
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["o_proj"], target_parameters=[f"experts.{name}" for name in parameters]
    )
    imported = check_import(base_of(family), config, tmp_path / "adapter")
    count = {"both": 3, "up": 2, "down": 1}[chosen]
    assert len([path for path, part in imported.adapter.items() if part.kind == "experts" and ".1." in path]) == count


def test_import_a_module_that_was_trained_whole(base_of: Callable[..., Base], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    imported = check_import(base_of("llama"), config, tmp_path / "adapter")
    assert imported.adapter["lm_head"].rank == 32 and imported.adapter["model.embed_tokens"].rank == 32
    assert any("trained whole" in note for note in imported.notes)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["norm"])
    trained(base_of("llama").torch_model(), config).save_pretrained(tmp_path / "norm")
    with pytest.raises(UnsupportedError, match=r"norm\.weight: this module was trained whole.*no matrix"):
        read_back(base_of("llama"), tmp_path / "norm")


def test_import_refuses_one_side_of_a_tied_table(base_of: Callable[..., Base], tmp_path: Path) -> None:
    for target, side in [("embed_tokens", "input"), ("lm_head", "output")]:
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[target])
        trained(base_of("qwen3").torch_model(), config).save_pretrained(tmp_path / target)
        with pytest.raises(UnsupportedError, match=f"{side} alone"):
            read_back(base_of("qwen3"), tmp_path / target)


# ---- us to PEFT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["lora", "patterns", "subset", "dora"])
def test_export(family: str, variant: str, base_of: Callable[..., Base], tmp_path: Path) -> None:
    base = base_of(family)
    places = bases.places(base.network())
    if variant == "lora":
        adapter = random_adapter(places, inside)
    elif variant == "patterns":
        ranks, scales = (lambda path: 2 + len(path) % 3), (lambda path: 0.5 + 0.1 * (len(path) % 5))
        adapter = random_adapter(places, inside, rank=ranks, scale=scales)
    elif variant == "subset":
        adapter = random_adapter(places, lambda path, place: ".1." in path and "o_proj" not in path)
    else:
        adapter = random_adapter(places, linear_inside)
        tensor = bases.tensors(base.network())
        for path, part in adapter.items():
            stored = tensor(f"{path}.weight")
            assert stored is not None
            lengths = mx.linalg.norm(stored + part.delta(), axis=1)
            adapter[path] = LowRank(part.kind, part.a, part.b, part.scale, lengths * (1.1 + 0.1 * mx.sin(lengths * 99)))
    check_export(base, adapter, tmp_path / "adapter")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_export_embeddings_and_head(family: str, base_of: Callable[..., Base], tmp_path: Path) -> None:
    base = base_of(family)
    places = bases.places(base.network())
    adapter = random_adapter(places, lambda path, place: not inside(path, place) and not path.endswith("wpe"))
    check_export(base, adapter, tmp_path / "adapter")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_export_experts_as_modules(family: str, base_of: Callable[..., Base], tmp_path: Path) -> None:
    """What transformers 4 needs; PEFT converts it for transformers 5 on loading."""
    base = base_of(family)
    adapter = random_adapter(bases.places(base.network()), lambda path, place: place.kind == "experts")
    check_export(base, adapter, tmp_path / "adapter", experts="modules")


@pytest.mark.parametrize("family", MOE)
def test_export_one_projection_of_the_experts(family: str, base_of: Callable[..., Base], tmp_path: Path) -> None:
    base = base_of(family)
    places = bases.places(base.network())
    for name in ("gate_proj", "up_proj", "down_proj"):
        chosen = {path: place for path, place in places.items() if place.kind == "experts" and path.endswith(name)}
        check_export(base, random_adapter(chosen, lambda path, place: True), tmp_path / name)


def test_gate_and_up_that_share_a_keep_their_rank(base_of: Callable[..., Base], tmp_path: Path) -> None:
    base = base_of("mixtral")
    network = base.network()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_parameters=["experts.gate_up_proj"], target_modules=[])
    trained(base.torch_model(), config).save_pretrained(tmp_path / "adapter")
    imported = read_back(base, tmp_path / "adapter")
    state = to_peft(imported.adapter, base.names(), bases.places(network))
    theirs = tiny.tensors(tmp_path / "adapter" / "adapter_model.safetensors")
    assert state.config["r"] == 2
    assert state.tensors.keys() == theirs.keys()
    assert all(bool(mx.array_equal(state.tensors[name], theirs[name])) for name in theirs)


def test_wrong_base_names_every_tensor(base_of: Callable[..., Base], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    trained(base_of("llama").torch_model(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        AdapterError, match=r"q_proj\.lora_A\.weight: expected shape \[4, 64\], found \[4, 32\]"
    ) as caught:
        read_back(base_of("llama", hidden_size=64), tmp_path / "adapter")
    assert len(caught.value.problems) >= 4
