"""LoRA, rsLoRA and DoRA layers against transformers + PEFT: logits, gradients, folded weights; TIES against PEFT's."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxlora import model as models
from mlxlora.adapters import AdapterConfig, adapter_layers, inject
from mlxlora.merge import _ties
from mlxlora.parameters import flat
from tests import tiny

torch = pytest.importorskip("torch", reason="pip install torch==2.13.0 transformers peft")
peft = pytest.importorskip("peft", reason="pip install torch==2.13.0 transformers peft")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOKENS = np.arange(3, 35).reshape(2, 16) * 7 % 512
NAMES = {
    "lora_a": "lora_A.default.weight",
    "lora_b": "lora_B.default.weight",
    "m": "lora_magnitude_vector.default.weight",
}


def tensor(array):
    return torch.from_numpy(np.array(array))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.transformers_directory(tmp_path_factory.mktemp("parity") / "llama", "llama")


def pair(directory, kind, **settings):
    """The same adapter with the same random values in both programs."""
    network, _ = models.load_network(directory)
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj", "lm_head"]
    inject(network, AdapterConfig(type=kind, rank=4, alpha=6, targets=targets, rslora=settings.get("rslora", False)))
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_dora=kind == "dora", use_rslora=settings.get("rslora", False)
    )
    reference = peft.get_peft_model(reference, config)
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for number, (path, layer) in enumerate(adapter_layers(network)):
            for name in layer.learned:
                noise = 0.1 * mx.random.normal(layer[name].shape, key=mx.random.key(number))
                layer[name] = layer[name] + noise
                theirs = parameters[f"base_model.model.{path}.{NAMES[name]}"]
                theirs.copy_(tensor(layer[name].T if name != "m" else layer[name]))
    return network, reference.eval(), parameters


@pytest.mark.parametrize(("kind", "settings"), [("lora", {}), ("lora", {"rslora": True}), ("dora", {})], ids=str)
def test_same_logits_gradients_and_folded_weights(directory, kind, settings):
    network, reference, parameters = pair(directory, kind, **settings)
    tokens = mx.array(TOKENS)

    def loss(network):
        logits = network(tokens)
        return nn.losses.cross_entropy(logits[:, :-1], tokens[:, 1:], reduction="mean"), logits

    (_, logits), gradients = nn.value_and_grad(network, lambda: loss(network))()
    theirs = reference(torch.from_numpy(TOKENS)).logits
    np.testing.assert_allclose(np.array(logits), theirs.detach().numpy(), atol=1e-5)
    wanted = torch.from_numpy(TOKENS[:, 1:]).reshape(-1)
    torch.nn.functional.cross_entropy(theirs[:, :-1].reshape(-1, theirs.shape[-1]), wanted).backward()
    for name, gradient in flat(gradients).items():
        path, _, part = name.rpartition(".")
        expected = parameters[f"base_model.model.{path}.{NAMES[part]}"].grad.numpy()
        expected = expected.T if part != "m" else expected
        np.testing.assert_allclose(np.array(gradient), expected, atol=2e-6 + 2e-5 * np.abs(expected).max())
    merged = dict(reference.merge_and_unload().named_parameters())
    for path, layer in adapter_layers(network):
        ours = np.array(layer.fuse().weight)
        np.testing.assert_allclose(ours, merged[f"{path}.weight"].detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_ties(density):
    from peft.utils.merge_utils import ties

    rng = np.random.default_rng(0)
    changes = [rng.normal(size=(24, 16)).astype(np.float32) for _ in range(3)]
    weights = [0.7, 0.7, 0.7]  # with others, PEFT elects signs before it weighs; ours counts the weights in
    expected = ties([torch.from_numpy(change) for change in changes], torch.tensor(weights), density)
    ours = _ties(changes, weights, density, rng)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-6)
