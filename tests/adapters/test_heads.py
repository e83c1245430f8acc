"""MLA's `kv_b_proj`, which mlx-lm keeps as two layers: one adapter for both, held against the one matrix that it is."""

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.mla import MultiLinear

from mlxlora import mlxlm
from mlxlora.adapters import (
    AdapterConfig,
    Adapters,
    LayerConfig,
    adapter_layers,
    collect,
    inject,
    load_adapter,
    read_adapter,
    remove,
    save_adapter,
    weights,
)
from mlxlora.adapters.dora import DoRAHeads
from mlxlora.adapters.heads import Half, put
from mlxlora.adapters.inject import get_module
from mlxlora.adapters.lora import LoRAHeads
from mlxlora.adapters.weights import Heads
from mlxlora.engine.structure import structure
from mlxlora.errors import AdapterError, ConfigError
from mlxlora.parameters import flat
from tests import tiny
from tests.architectures import small

HEADS, KEYS, VALUES, LATENT = 3, 32, 64, 128
MODES = [None, ("affine", 4, 32), ("affine", 3, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
KINDS: dict[Any, Any] = {"lora": LoRAHeads, "dora": DoRAHeads}
TOKENS = mx.arange(3, 23)[None]
TARGETS: dict[str, Any] = {"targets": ["kv_b_proj"]}


OTHERS = ("deepseek_v32", "kimi_linear", "longcat_flash", "mistral4")  # each splits it in code of its own


def random_network(family):
    if family == "deepseek_v3":
        return tiny.network(family)
    network = mlxlm.build(small.config(family))
    for number, (name, array) in enumerate(flat(network.parameters()).items()):
        if name.endswith(("embed_q.weight", "unembed_out.weight")):
            network.load_weights([(name, 0.3 * mx.random.normal(array.shape, key=mx.random.key(number)))], strict=False)
    return network


def wrapped(kind, mode=None, **settings):
    """Two halves, an adapter of which no array is at its start around them, and what stands in their places."""
    halves = MultiLinear(KEYS, LATENT, HEADS), MultiLinear(LATENT, VALUES, HEADS)
    if mode is not None:
        halves = tuple(half.to_quantized(group_size=mode[2], bits=mode[1], mode=mode[0]) for half in halves)
    whole = KINDS[kind].wrap(Heads(*halves), LayerConfig(rank=4, scale=1.5, **settings), mx.random.key(1))
    for number, name in enumerate(whole.learned):
        whole[name] = whole[name] + 0.1 * mx.random.normal(whole[name].shape, key=mx.random.key(number))
    return whole, Half(whole, weights.KEYS), Half(whole, weights.VALUES)


def dense(whole):
    """The one matrix with its adapter, written out, as keys [H, N, R] and values [H, V, R]."""
    halves = whole.base.halves
    keys, values = weights.dense(halves[weights.KEYS]).swapaxes(1, 2), weights.dense(halves[weights.VALUES])
    matrix = mx.concatenate([keys, values], axis=1).reshape(HEADS * (KEYS + VALUES), LATENT)
    matrix = matrix + 1.5 * (whole.lora_a @ whole.lora_b).T
    if "m" in whole:
        matrix = matrix * (whole.m / mx.linalg.norm(matrix, axis=-1))[:, None]
    return mx.split(matrix.reshape(HEADS, KEYS + VALUES, LATENT), [KEYS], axis=1)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_matrix(kind, mode, close):
    whole, keys, values = wrapped(kind, mode)
    k, v = dense(whole)
    assert (whole.input_dims, whole.output_dims) == (LATENT, HEADS * (KEYS + VALUES))
    latent = mx.random.normal((2, 1, 5, LATENT), key=mx.random.key(8))
    queries = mx.random.normal((2, HEADS, 1, KEYS), key=mx.random.key(9))
    close(keys(latent, transpose=False), latent @ k.swapaxes(1, 2), 2e-5)
    close(values(latent), latent @ v.swapaxes(1, 2), 2e-5)
    close(keys(queries), queries @ k, 2e-5)
    close(whole.adapted(), mx.concatenate([k, v], axis=1).reshape(-1, LATENT))
    fused = whole.fuse(dequantize=True)
    close(weights.dense(fused), whole.adapted())
    assert [type(half) for half in whole.fuse().halves.values()] == [type(half) for half in whole.base.halves.values()]
    assert weights.quantization(values.fuse()) == weights.quantization(values.base)


def test_a_fresh_one_changes_nothing_and_its_halves_come_back():
    for kind in KINDS:
        whole = KINDS[kind].wrap(wrapped(kind)[0].base, LayerConfig(4, 1.0), mx.random.key(1))
        assert not whole.changes()
        assert all(a is b for a, b in zip(whole.fuse().halves.values(), whole.base.halves.values(), strict=True))


def test_keys_and_values_see_the_same_latent_when_some_of_it_is_dropped(close):
    """PEFT drops entries of the one input that the one projection has."""
    whole, keys, values = wrapped("lora", dropout=0.5)
    k, v = dense(whole)
    latent = mx.random.normal((2, 1, 5, LATENT), key=mx.random.key(8))
    whole.set_dropout_key(mx.random.key(3))
    seen = whole.drop(latent)
    assert 0.3 < float(mx.mean(seen == 0)) < 0.7
    plain = whole.base.halves
    for half, role, full in ((keys, weights.KEYS, k), (values, weights.VALUES, v)):
        given = {"transpose": False} if role == weights.KEYS else {}
        base = weights.dense(plain[role]).swapaxes(1, 2) if role == weights.KEYS else weights.dense(plain[role])
        close(half(latent, **given), latent @ base.swapaxes(1, 2) + seen @ (full - base).swapaxes(1, 2), 2e-5)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("deepseek_v3", kind) for kind in KINDS),
        *((family, "lora") for family in OTHERS),
    ],
)
def test_in_a_network_token_by_token_as_all_at_once(family, kind, stir, close):
    """A single token is computed with queries in the space of the latent, several with keys of their own."""
    network = random_network(family)
    modules = {path: id(module) for path, module in network.named_modules()}
    base = network(TOKENS)
    injection = stir(network, AdapterConfig(type=kind, rank=4, alpha=8, **TARGETS))
    assert {path.rpartition(".")[2] for path in injection.paths} == {"kv_b_proj"}
    names = list(flat(network.trainable_parameters()))
    assert {name.rpartition(".")[0] for name in names} == set(injection.paths)
    assert injection.paths == tuple(path for path, _ in adapter_layers(network))
    together = network(TOKENS)
    assert float(mx.abs(together - base).max()) > 0.1
    cache = mlxlm.prompt_cache(network)
    steps = [network(TOKENS[:, :7], cache=cache)]
    steps += [network(TOKENS[:, i : i + 1], cache=cache) for i in range(7, TOKENS.shape[1])]
    close(mx.concatenate(steps, axis=1), together, 2e-5)
    remove(network)
    assert {path: id(module) for path, module in network.named_modules()} == modules
    assert mx.array_equal(network(TOKENS), base)


def test_which_names_mean_it():
    for targets in (["all-linear"], ["attention"], ["kv_b_proj"], ["self_attn.kv_*"]):
        injection = inject(tiny.network("deepseek_v3"), AdapterConfig(targets=targets))
        assert "model.layers.0.self_attn.kv_b_proj" in injection.paths
        assert not any(path.endswith(("embed_q", "unembed_out")) for path in injection.paths)
        assert injection.left_out == {}
    for half in ("embed_q", "unembed_out"):
        with pytest.raises(ConfigError, match=f"'{half}': is a half of kv_b_proj.*Name kv_b_proj"):
            inject(tiny.network("deepseek_v3"), AdapterConfig(targets=[half]))
    whole = tiny.network("deepseek_v3")
    assert len(inject(whole, AdapterConfig(type="full", targets=["embed_q"])).paths) == 2
    with pytest.raises(ConfigError, match="kv_b_proj is embed_q and unembed_out here"):
        inject(tiny.network("deepseek_v3"), AdapterConfig(type="full", targets=["kv_b_proj"]))


def test_blocks_that_carry_it_share_what_is_compiled():
    network = tiny.network("deepseek_v3")
    inject(network, AdapterConfig(rank=4, **TARGETS))
    first, second = (structure(layer.self_attn) for layer in network.layers)
    assert first == second
    remove(network)
    inject(network, AdapterConfig(rank=4, alpha_pattern={"layers.1.*": 3}, **TARGETS))
    first, second = (structure(layer.self_attn) for layer in network.layers)
    assert first != second


def test_a_router_that_holds_its_matrix_itself(stir, close):
    """What comes out of it are choices: it has to compute with the changed matrix."""
    network = tiny.network("deepseek_v3")
    gate = network.layers[1].mlp.gate
    x = mx.random.normal((2, 7, 32), key=mx.random.key(4))
    before = gate(x)
    injection = stir(network, AdapterConfig(rank=2, alpha=4, targets=["mlp.gate"]), size=0.4)
    layer = get_module(network, "model.layers.1.mlp.gate")
    assert (injection.paths, layer.base is gate) == (("model.layers.1.mlp.gate",), True)
    own = gate.weight
    expected = layer.fuse()(x)
    assert gate.weight is own
    close(weights.dense(layer.fuse()), own + 2 * (layer.lora_a @ layer.lora_b).T)
    assert not all(mx.array_equal(a, b).item() for a, b in zip(before, expected, strict=True))
    assert all(mx.array_equal(a, b).item() for a, b in zip(layer(x), expected, strict=True))
    adapter = collect(network)
    remove(network)
    adapters = Adapters(network)
    adapters.add(adapter, name="router")
    assert all(mx.array_equal(a, b).item() for a, b in zip(network.layers[1].mlp.gate(x), expected, strict=True))
    adapters["router"].scale = 0
    assert all(mx.array_equal(a, b).item() for a, b in zip(network.layers[1].mlp.gate(x), before, strict=True))
    with pytest.raises(ConfigError, match=r"MoEGate.*cannot carry dora"):
        inject(tiny.network("deepseek_v3"), AdapterConfig(type="dora", targets=["mlp.gate"]))


def test_files(stir, tmp_path, close):
    network = tiny.network("deepseek_v3")
    stir(network, AdapterConfig(rank=4, alpha=8, rank_pattern={"layers.1.*": 2}))
    expected = network(TOKENS)
    save_adapter(tmp_path / "a", collect(network))
    adapter = read_adapter(tmp_path / "a")
    path = "model.layers.1.self_attn.kv_b_proj"
    shape = weights.shape(get_module(tiny.network("deepseek_v3"), path))
    assert (adapter.modules[path].rank, adapter.modules[path].arrays["lora_b"].shape) == (2, (2, shape[0]))
    again = tiny.network("deepseek_v3")
    inject(again, AdapterConfig(rank=4, alpha=8))
    load_adapter(again, adapter)
    close(again(TOKENS), expected)
    with pytest.raises(AdapterError, match=rf"{path}\.lora_b: expected shape \[2, .*\], found \[2, {shape[0]}\]"):
        Adapters(tiny.network("deepseek_v3", v_head_dim=24)).add(adapter)


def test_several_at_once(stir, close):
    made = []
    for seed, kind in enumerate(KINDS):
        network = tiny.network("deepseek_v3")
        stir(network, AdapterConfig(type=kind, rank=4, alpha=8, **TARGETS), seed=seed + 1)
        made.append((collect(network), network(TOKENS)))
    network = tiny.network("deepseek_v3")
    modules = {path: id(module) for path, module in network.named_modules()}
    adapters = Adapters(network)
    for number, (adapter, _) in enumerate(made):
        adapters.add(adapter, name=str(number), scale=0)
    assert mx.array_equal(network(TOKENS), tiny.network("deepseek_v3")(TOKENS))
    for number, (_, expected) in enumerate(made):
        adapters.set_scales({"0": 1 - number, "1": number})
        close(network(TOKENS), expected, 2e-5)
    adapters.set_scales({"0": 0.5, "1": -0.3})
    expected = network(TOKENS)
    cache = mlxlm.prompt_cache(network)
    steps = [network(TOKENS[:, i : i + 1], cache=cache) for i in range(TOKENS.shape[1])]
    close(mx.concatenate(steps, axis=1), expected, 2e-5)
    plain = tiny.network("deepseek_v3")
    for layer, slot in zip(plain.layers, network.layers, strict=True):
        put(layer.self_attn, slot.self_attn.kv_b_proj.fuse())
    close(plain(TOKENS), expected, 2e-5)
    adapters.clear()
    assert {path: id(module) for path, module in network.named_modules()} == modules
