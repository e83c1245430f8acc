"""What is measured: models with the layer shape of Qwen3-0.6B (fewer layers, the head's share kept), and batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxlora import mlxlm
from mlxlora.adapters import AdapterConfig, inject
from mlxlora.data.sample import Batch, Sample

Arrays = dict[str, npt.NDArray[np.float32]]
RANK = 8  # of all adapters
ROW = 32  # mlx-lm pads rows to multiples of this; all contestants of a step get the same rows
BATCH = 4  # samples of an optimizer step of mlx-lm's trainer, where there are so many
# contestants, by the names that the table has for them and in its order
MLX_LM = SHIPPED, STEP, CHECKPOINT = "mlx-lm trainer", "mlx-lm step", "mlx-lm `grad_checkpoint`"
TORCH = PEFT, PEFT_CHECKPOINT = "PyTorch + PEFT", "PyTorch + PEFT, checkpointing"
OURS = TRAINER, PRODUCTS, INPUTS = "mlxlora trainer, `products`", "mlxlora, `products`", "mlxlora, `inputs`"


class LeftOut(Exception):
    """Why a contestant does not run here."""


@dataclass(frozen=True)
class Scenario:
    """One row of the table.

    lengths:  tokens of the samples of a batch
    prompt:   share of each sample that carries no weight
    last:     adapters on the last so many blocks only; 0 for all
    bits:     quantization of the base; 0 for none
    experts:  experts of each block (2 are chosen); 0 for a dense model
    passes:   how often the whole trainers go through the samples in one measured run
    entrants: who takes part; a quantized base and mlx-lm's experts are not PyTorch's
    """

    name: str
    title: str
    lengths: tuple[int, ...] = (250,) * 4
    prompt: float = 0.6
    hidden: int = 1024
    layers: int = 4
    vocabulary: int = 21_704  # 151,936 · 4 / 28: the share of the head in Qwen3-0.6B
    last: int = 0
    bits: int = 0
    experts: int = 0
    passes: int = 4  # what a trainer does once a run should be little of it
    entrants: tuple[str, ...] = (*MLX_LM, *TORCH, *OURS)

    def __post_init__(self) -> None:
        """Raise ValueError for samples of which mlx-lm's trainer would leave some out."""
        if len(self.lengths) % self.batch:
            raise ValueError(f"{len(self.lengths)} samples are no whole number of batches of {self.batch}")

    @property
    def batch(self) -> int:
        """Samples of an optimizer step of mlx-lm's trainer."""
        return min(BATCH, len(self.lengths))

    @property
    def trained(self) -> int:
        """Tokens with weight."""
        return sum(length - self.asked(length) for length in self.lengths)

    def asked(self, length: int) -> int:
        """Tokens at the start of a sample of this length that carry no weight."""
        return max(1, round(length * self.prompt))

    def smaller(self, hidden: int) -> Scenario:
        """The same with another width of the model."""
        return replace(self, hidden=hidden)


def chat_lengths(count: int, seed: int = 0, mean: float = 250.0) -> tuple[int, ...]:
    """Lengths of chat samples: log-normal, as they are in the wild."""
    random = np.random.default_rng(seed)
    drawn = random.lognormal(np.log(mean) - 0.5 * 0.7**2, 0.7, count)
    return tuple(int(length) for length in np.clip(drawn, 24, 1500))


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "trainers", "chat data, whole trainers", chat_lengths(24), passes=1, entrants=(SHIPPED, TRAINER)
        ),
        Scenario("chat", "chat batch, prompts masked", (150, 240, 260, 410)),
        Scenario("text", "full-loss text", (256,) * 4, prompt=0.0),
        Scenario("vocabulary", "vocabulary 151,936", (100, 150, 110, 200), hidden=256, vocabulary=151_936),
        Scenario("4k", "one sample of 4,096 tokens", (4096,), hidden=256, vocabulary=5_426),
        Scenario(
            "16k", "one sample of 16,384 tokens", (16_384,), hidden=128, layers=2, vocabulary=2_713, passes=1,
            entrants=(SHIPPED, STEP, *TORCH, *OURS),
        ),
        Scenario(
            "last-quarter", "LoRA on the last quarter, second epoch", (150, 240, 260, 410), hidden=512, layers=8,
            last=2, entrants=(SHIPPED, STEP, *TORCH, TRAINER, PRODUCTS),
        ),
        Scenario("4-bit", "4-bit base", (60, 90), hidden=256, vocabulary=5_426, bits=4, entrants=(*MLX_LM, *OURS)),
        Scenario(
            "moe", "mixture of experts", (100, 150, 110, 200), hidden=256, vocabulary=5_426, experts=8,
            entrants=(*MLX_LM, *OURS),
        ),
    )
}  # fmt: skip


def config(scenario: Scenario) -> dict[str, Any]:
    """The config.json of the scenario's model."""
    hidden = scenario.hidden
    made: dict[str, Any] = {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": scenario.layers,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": max(2, hidden // 64),
        "num_key_value_heads": max(1, hidden // 128),
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "vocab_size": scenario.vocabulary,
        "max_position_embeddings": 40_960,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }
    if scenario.experts:
        made |= {
            "model_type": "qwen3_moe",
            "num_experts": scenario.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": hidden,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
    return made


def network(scenario: Scenario, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """The scenario's model with random weights and adapters of rank 8 that do something; the same in every process."""
    mx.random.seed(0)
    built = mlxlm.build(config(scenario))
    built.set_dtype(dtype)
    if scenario.bits:
        nn.quantize(built, group_size=64, bits=scenario.bits)
    inject(built, AdapterConfig(rank=RANK, alpha=2 * RANK, layers=scenario.last or "all"), seed=1)
    key = mx.random.key(3)
    for _, module in built.named_modules():
        if "lora_b" in module:
            key, part = mx.random.split(key)
            module.lora_b = 0.02 * mx.random.normal(module.lora_b.shape, key=part)
    mx.eval(built.parameters())
    return built


def samples(scenario: Scenario) -> list[Sample]:
    """The scenario's samples, random tokens."""
    random = np.random.default_rng(0)
    made = []
    for number, length in enumerate(scenario.lengths):
        weights = (np.arange(length) >= scenario.asked(length)).astype(np.float32)
        tokens = random.integers(1, scenario.vocabulary, length).astype(np.int32)
        made.append(Sample(tokens, weights, f"sample {number}"))
    return made


def padded(made: list[Sample]) -> Batch:
    """One sample a row, all rows of one length that mlx-lm would choose as well."""
    length = -(-max(len(sample.tokens) for sample in made) // ROW) * ROW
    tokens = np.zeros((len(made), length), np.int32)
    places, targets = [], []
    for row, sample in enumerate(made):
        tokens[row, : len(sample.tokens)] = sample.tokens
        scored = np.flatnonzero(sample.weights)
        places += list(row * length + scored - 1)
        targets += list(sample.tokens[scored])
    return Batch(
        mx.array(tokens), mx.array(np.array(places, np.int32)), mx.array(np.array(targets, np.int32)),
        mx.ones(len(places)), samples=tuple(range(len(made))),
    )  # fmt: skip
