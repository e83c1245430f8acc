"""Training against PyTorch + PEFT: same model, same start, same batches, float32; same gradients, same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.parameters import flat

torch = pytest.importorskip("torch", reason="pip install torch transformers peft")
peft = pytest.importorskip("peft", reason="pip install torch transformers peft")
transformers = pytest.importorskip("transformers", reason="pip install torch transformers peft")

from mlxlora.adapters import AdapterConfig, collect, inject  # noqa: E402
from mlxlora.data.sample import Sample  # noqa: E402
from mlxlora.engine.config import EngineConfig  # noqa: E402
from mlxlora.engine.engine import Engine  # noqa: E402
from mlxlora.model import load_network  # noqa: E402
from mlxlora.objectives.sft import sft  # noqa: E402
from mlxlora.training.optimizer import OptimizerConfig  # noqa: E402
from mlxlora_convert.base import places  # noqa: E402
from mlxlora_convert.names import Names  # noqa: E402
from mlxlora_convert.ours import to_lowrank  # noqa: E402
from mlxlora_convert.peft_export import to_peft  # noqa: E402
from tests import reference, tiny  # noqa: E402
from tests.rows import Rows, train  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
FAMILIES = ["llama", "qwen3", "gemma3", "phi3", "deepseek_v3"]
TARGETS = {"deepseek_v3": ["attention"]}  # PEFT keeps one A for the gate and up projection of an expert
CHANGES = {"gemma3": {"hidden_size": 64}}  # mlx-lm rounds √hidden_size to bfloat16; that of 64 is exact
SAMPLES = reference.samples([23, 40, 9, 31, 4, 17, 12, 26], tiny.VOCABULARY)
STEPS = 6


class Pair:
    """One model with one adapter, ours and PEFT's, with the same numbers in both."""

    def __init__(self, family: str, kind: str, folder: Path) -> None:
        directory = tiny.transformers_directory(folder / "model", family, **CHANGES.get(family, {}))
        self.network, config = load_network(directory)
        known, names = places(self.network), Names.of(config)
        settings = AdapterConfig(type=kind, rank=4, alpha=8.0, targets=TARGETS.get(family, []))  # type: ignore[arg-type]
        inject(self.network, settings, seed=1)
        reference.awaken(self.network)
        state = to_peft(to_lowrank(collect(self.network), known), names, known)
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps({**state.config, "inference_mode": False}))
        mx.save_safetensors(str(folder / "adapter" / "adapter_model.safetensors"), state.tensors)
        base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.torch = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()
        self.ours = {  # our parameter's name: PEFT's tensor, and whether it is turned
            f"{path}.{part}": (f"base_model.model.{names.to_hf(path)}.{theirs}", turned)
            for path in {name.rpartition(".")[0] for name in flat(self.network.trainable_parameters())}
            for part, theirs, turned in (
                ("lora_a", "lora_A.default.weight", True),
                ("lora_b", "lora_B.default.weight", True),
                ("m", "lora_magnitude_vector.default.weight", False),
            )
        }

    def torch_loss(self, rows: list[Sample]) -> tuple[Any, float]:
        """The summed loss and the weight of a batch, by PyTorch: a plain cross-entropy over shifted logits."""
        width = max(len(row.tokens) for row in rows)
        tokens = torch.zeros((len(rows), width), dtype=torch.long)
        weights = torch.zeros((len(rows), width))
        for number, row in enumerate(rows):
            tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
            weights[number, : len(row.tokens)] = torch.tensor(row.weights)
        logits = self.torch(tokens).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return (each * weights[:, 1:].flatten()).sum(), float(weights[:, 1:].sum())

    def torch_gradients(self) -> dict[str, np.ndarray]:
        found = {name: parameter for name, parameter in self.torch.named_parameters() if parameter.requires_grad}
        return {
            ours: found[theirs].grad.numpy().T if turned else found[theirs].grad.numpy()
            for ours, (theirs, turned) in self.ours.items()
            if theirs in found
        }


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family: str, kind: str, tmp_path: Path) -> None:
    pair = Pair(family, kind, tmp_path)
    total, weight = pair.torch_loss(SAMPLES)
    total.backward()
    engine = Engine(pair.network, EngineConfig(compile="never"))
    ours, count, _, grads = engine.value_and_grad(sft, reference.padded(SAMPLES, pad_positions=3))
    assert count.item() == pytest.approx(weight)
    assert ours.item() / weight == pytest.approx(total.item() / weight, rel=1e-6)
    theirs = {name: mx.array(np.ascontiguousarray(array)) for name, array in pair.torch_gradients().items()}
    assert reference.gradient_error(grads, _tree(theirs)) < 1e-5


def _tree(flat: dict[str, mx.array]) -> Any:
    from mlx.utils import tree_unflatten

    return tree_unflatten(list(flat.items()))


@pytest.mark.parametrize(
    ("family", "kind", "accumulate"),
    [*((family, kind, 1) for family in FAMILIES for kind in ("lora", "dora")), ("llama", "lora", 2)],
)
def test_losses_over_several_updates(family: str, kind: str, accumulate: int, tmp_path: Path) -> None:
    """AdamW with bias correction, weight decay and clipping, over batches that differ from step to step."""
    pair = Pair(family, kind, tmp_path)
    rows = Rows(SAMPLES, 2)
    settings = OptimizerConfig(
        learning_rate=2e-3, schedule="constant", warmup_steps=0, weight_decay=0.05, max_grad_norm=0.5
    )
    trained = [parameter for parameter in pair.torch.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in trained if one.ndim >= 2], "weight_decay": 0.05},
        {"params": [one for one in trained if one.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=2e-3)
    theirs = []
    batches = [[SAMPLES[place] for place in planned] for planned in rows.plan(0)]
    for step in range(STEPS):
        optimizer.zero_grad()
        per_epoch = len(batches) // accumulate
        first = step % per_epoch * accumulate
        sums = [pair.torch_loss(batch) for batch in batches[first : first + accumulate]]
        loss = sum(total for total, _ in sums) / sum(weight for _, weight in sums)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        theirs.append(loss.item())
    ours, _ = train(pair.network, rows, settings, steps=STEPS, accumulate=accumulate)
    assert abs(theirs[0] - theirs[-1]) > 5e-4
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
