"""How near the planner's peak comes to the peak of real steps: families × adapter × quantization × length.

    python benchmarks/plan_accuracy.py [--families llama,qwen3] [--lengths 256,1024] [--kinds lora,full]

Models have random weights and realistic proportions (hidden 256, 8 blocks, a vocabulary of 8,192), so that everything
fits a small machine. For each case the planner probes, then a fresh engine makes two whole steps, update included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora import mlxlm
from mlxlora.adapters import AdapterConfig, inject
from mlxlora.engine import Engine, EngineConfig
from mlxlora.objectives.sft import sft
from mlxlora.parameters import flat
from mlxlora.training.forecast import Shape, forecast, synthetic
from mlxlora.training.optimizer import Optimizer, OptimizerConfig

VOCABULARY = 8_192
COMMON: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY,
    "max_position_embeddings": 16_384, "rope_theta": 10_000.0, "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {
        "query_pre_attn_scalar": 32, "sliding_window": 512, "sliding_window_pattern": 6,
        "rope_local_base_freq": 10_000.0,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
}  # fmt: skip
KINDS: dict[str, tuple[str, int | None]] = {"lora": ("lora", None), "qlora": ("lora", 4), "full": ("full", None)}


def network(family: str, bits: int | None) -> nn.Module:
    """A network with random weights, quantized to `bits`."""
    mx.random.seed(0)
    made = mlxlm.build({"model_type": family, **COMMON, **FAMILIES[family]})
    if bits:
        nn.quantize(made, group_size=64, bits=bits)
    mx.eval(made.parameters())
    return made


def predicted_and_measured(family: str, adapter: str, bits: int | None, grade: Any, length: int) -> tuple[int, int]:
    """Peak bytes: what the planner says, and what two steps took."""
    model = network(family, bits)
    inject(model, AdapterConfig(type="full") if adapter == "full" else AdapterConfig(rank=16))
    optimizer = Optimizer(OptimizerConfig(), 10)
    optimizer.init(flat(model.trainable_parameters()))
    config, shape = EngineConfig(checkpoint_blocks=grade), Shape(1, length, 0.5)
    predicted = forecast(model, config, optimizer, sft, shape, vocabulary=VOCABULARY).peak
    batch = synthetic(1, length, 0.5, VOCABULARY)
    engine = Engine(model, config)
    measured = 0
    mx.reset_peak_memory()
    for step in range(2):
        total, count, _, gradients = engine.value_and_grad(sft, batch, mx.random.key(step))
        summed = flat(gradients)
        del gradients
        mx.async_eval(summed, total, count)
        parameters, norm, _ = optimizer.update(flat(model.trainable_parameters()), summed, total, count, step)
        del summed
        model.update(nested(parameters))
        mx.eval(parameters, optimizer.state, norm)
        del parameters
        measured = max(measured, mx.get_peak_memory())
    engine.close()
    return predicted, measured


def nested(flat: dict[str, mx.array]) -> Any:
    from mlx.utils import tree_unflatten

    return tree_unflatten(list(flat.items()))


def main() -> None:
    """Print the table and its summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--lengths", default="256,1024,4096,8192")
    parser.add_argument("--kinds", default=",".join(KINDS), help="what learns on which base")
    parser.add_argument("--longest_full", type=int, default=1024, help="full fine-tuning only up to this length")
    wanted = parser.parse_args()
    lengths = [int(text) for text in wanted.lengths.split(",")]
    print("| family | learns | base | keeps | " + " | ".join(f"{length:,}" for length in lengths) + " |")
    print("|---|---|---|---|" + "---:|" * len(lengths))
    ratios: list[float] = []
    for family in wanted.families.split(","):
        for adapter, bits in (KINDS[name] for name in wanted.kinds.split(",")):
            for grade in ("products", "inputs"):
                base = f"{bits} bits" if bits else "float32"
                print(f"| {family} | {adapter} | {base} | {grade} |", end="", flush=True)
                for length in lengths:
                    if adapter == "full" and length > wanted.longest_full:
                        print(" |", end="")
                        continue
                    predicted, measured = predicted_and_measured(family, adapter, bits, grade, length)
                    ratios.append(predicted / measured)
                    print(f" {ratios[-1]:.2f} ({measured / 1e6:,.0f} MB) |", end="", flush=True)
                    gc.collect()
                    mx.clear_cache()
                print()
    off = [abs(ratio - 1) for ratio in ratios]
    within = sum(one <= 0.1 for one in off)
    print(
        f"\n{within} of {len(ratios)} within 10 % of the measured peak; median {statistics.median(ratios):.3f}, "
        f"from {min(ratios):.2f} to {max(ratios):.2f}."
    )


if __name__ == "__main__":
    main()
