"""Which modules are chosen, what trains, and that the model comes back as it was."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama, qwen3_moe

from mlxlora.adapters import AdapterConfig, LoRALinear, adapter_layers, inject, injected, remove
from mlxlora.errors import ConfigError, UnsupportedError
from mlxlora.parameters import flat

COMMON = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "moe_intermediate_size": 32, "model_type": "qwen3_moe",
}  # fmt: skip


def dense(tied=False):
    arguments = llama.ModelArgs.from_dict({**COMMON, "model_type": "llama", "tie_word_embeddings": tied})
    return llama.Model(arguments)


def mixture():
    return qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict({**COMMON, **MOE, "tie_word_embeddings": False}))


def leaves(network):
    injection = injected(network)
    assert injection is not None
    return {path.split("layers.", 1)[-1].split(".", 1)[-1] for path in injection.paths}


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
EXPERTS = {f"mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("build", "targets", "expected"),
    [
        (dense, [], ATTENTION | MLP),
        (dense, ["attention"], ATTENTION),
        (dense, ["attention+mlp"], ATTENTION | MLP),
        (dense, ["output"], {"lm_head"}),
        (lambda: dense(tied=True), ["output"], {"embed_tokens"}),
        (dense, ["q_proj", "mlp.down_proj"], {"self_attn.q_proj", "mlp.down_proj"}),
        (dense, ["attention", "output"], ATTENTION | {"lm_head"}),
        (mixture, ["all-linear"], ATTENTION | EXPERTS),
        (mixture, ["mlp.gate"], {"mlp.gate"}),
    ],
)
def test_targets(build, targets, expected):
    network = build()
    inject(network, AdapterConfig(targets=targets))
    assert {leaf.removeprefix("model.") for leaf in leaves(network)} == expected


def test_layers():
    def blocks(layers):
        network = dense()
        return sorted({int(path.split(".")[2]) for path in inject(network, AdapterConfig(layers=layers)).paths})

    assert (blocks("all"), blocks(2), blocks([0, 2])) == ([0, 1, 2], [1, 2], [0, 2])
    for wrong in (4, [3]):
        with pytest.raises(ConfigError, match="has"):
            blocks(wrong)


def test_rank_and_alpha_patterns():
    config = AdapterConfig(rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.*": 3}, rslora=True)
    network = dense()
    inject(network, config)
    layers = dict(adapter_layers(network))
    assert layers["model.layers.0.self_attn.q_proj"].lora_a.shape == (32, 2)
    assert layers["model.layers.0.self_attn.q_proj"].scale == pytest.approx(8 / 2**0.5)
    assert layers["model.layers.1.mlp.up_proj"].scale == pytest.approx(3 / 2)


def test_names_that_mean_nothing_are_named_with_their_neighbours():
    with pytest.raises(ConfigError) as caught:
        inject(dense(), AdapterConfig(targets=["q_prj", "layers.9.*"], rank_pattern={"nothing": 2}))
    text = str(caught.value)
    assert "'q_prj'" in text
    assert "Nearest: q_proj" in text
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="rank_pattern"):
        inject(dense(), AdapterConfig(rank_pattern={"vproj": 2}))
    with pytest.raises(ConfigError, match="RMSNorm"):
        inject(dense(), AdapterConfig(targets=["model.norm"]))


@pytest.mark.parametrize("build", [dense, mixture, lambda: quantized(dense())])
def test_only_adapters_train_and_everything_comes_back(build):
    network = build()
    network.layers[1].freeze()
    tokens = mx.arange(12)[None]
    modules = {path: id(module) for path, module in network.named_modules()}
    trainable = list(flat(network.trainable_parameters()))
    attributes = set(vars(network))
    before = network(tokens)
    injection = inject(network, AdapterConfig(targets=["all-linear", "embed_tokens", "lm_head"]), seed=3)
    names = list(flat(network.trainable_parameters()))
    assert {name.rsplit(".", 1)[1] for name in names} == {"lora_a", "lora_b"}
    assert {name.rsplit(".", 1)[0] for name in names} == set(injection.paths)
    assert injection.trainable == sum(a.size for a in flat(network.trainable_parameters()).values())
    assert mx.array_equal(network(tokens), before)
    remove(network)
    assert {path: id(module) for path, module in network.named_modules()} == modules
    assert list(flat(network.trainable_parameters())) == trainable
    assert set(vars(network)) == attributes
    assert mx.array_equal(network(tokens), before)


def quantized(network):
    nn.quantize(network, group_size=32, bits=5)
    return network


def test_totals_count_unpacked_weights():
    plain, packed = inject(dense(), AdapterConfig()), inject(quantized(dense()), AdapterConfig())
    assert plain.total == packed.total == sum(a.size for a in flat(dense().parameters()).values())


def test_start_depends_on_seed_and_path_alone():
    def start(seed, targets):
        network = dense()
        inject(network, AdapterConfig(targets=targets), seed=seed)
        return dict(adapter_layers(network))["model.layers.2.mlp.up_proj"].lora_a

    assert mx.array_equal(start(1, ["up_proj"]), start(1, ["all-linear"]))
    assert not mx.array_equal(start(1, ["up_proj"]), start(2, ["up_proj"]))


def test_twice_is_refused():
    network = dense()
    inject(network, AdapterConfig())
    with pytest.raises(ConfigError, match="already"):
        inject(network, AdapterConfig())


def test_one_module_in_two_places_is_refused():
    network = dense()
    network.layers[1].mlp.up_proj = network.layers[0].mlp.up_proj
    with pytest.raises(UnsupportedError, match="one and the same"):
        inject(network, AdapterConfig())


def test_a_refusal_leaves_the_model_alone():
    network = dense()
    with pytest.raises(ConfigError):
        inject(network, AdapterConfig(targets=["q_proj", "nope"]))
    assert not any(isinstance(module, LoRALinear) for module in network.modules())
    assert len(flat(network.trainable_parameters())) == len(flat(network.parameters()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0}, {"rank": True}, {"alpha": float("nan")}, {"alpha": -1.0}, {"dropout": 1.0}, {"layers": 0},
        {"layers": []}, {"layers": [1, 1]}, {"layers": "some"}, {"targets": [""]}, {"type": "qlora"},
        {"type": "full", "dropout": 0.1}, {"targets": ["all"]}, {"rank_pattern": {"q_proj": 0}},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_right(wrong):
    with pytest.raises(ConfigError):
        AdapterConfig(**wrong)


def test_a_model_that_assigns_the_weight_of_an_adapted_layer_is_told_so():
    layer = LoRALinear.wrap(nn.Linear(8, 8), AdapterConfig().layer("x"))
    with pytest.raises(UnsupportedError, match="leave it out of the targets"):
        layer.weight = layer.weight * 2


def test_state_space_layers_of_a_mixture_are_no_feed_forward():
    from mlx_lm.models import granitemoehybrid

    names = ["mamba", "attention"]
    arguments = granitemoehybrid.ModelArgs.from_dict({
        **COMMON, "model_type": "granitemoehybrid", "num_hidden_layers": 2, "layer_types": names,
        "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 32, "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_proj_bias": False, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_groups": 1, "mamba_conv_bias": False,
        "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
        "position_embedding_type": "rope", "attention_bias": False, "tie_word_embeddings": True,
        "time_step_limit": (0.001, 100.0),
    })  # fmt: skip
    network = granitemoehybrid.Model(arguments)
    inject(network, AdapterConfig(targets=["attention+mlp"]))
    chosen = leaves(network)
    assert "block_sparse_moe.switch_mlp.up_proj" in chosen
    assert not any("mamba" in path or "router" in path for path in chosen)
    remove(network)
    inject(network, AdapterConfig())
    assert "mamba.in_proj" in leaves(network)
