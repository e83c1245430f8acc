"""How each architecture's tensors stand in a Hugging Face checkpoint: what mlx-lm's `sanitize()` did, undone.

A family is a tuple of rules; a rule takes the MLX tensors that it fits and gives the checkpoint's. Tensors that no
rule fits keep their name and their values. Every rule is a bijection whose inverse is mlx-lm's own `sanitize()`:
huggingface.py applies that to what the rules gave and demands the same names and bits, for the very model that is
exported.

An architecture that is not in the table is refused. `sanitize()` accepts its own output as well, so without a table
experts in MLX's layout would pass that proof, and transformers would load them as random weights without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from mlxlora.errors import UnsupportedError, nearest
from mlxlora_convert.names import fit

Tensors = dict[str, mx.array]
Config = dict[str, Any]


class Rule(Protocol):
    """One thing that `sanitize()` does, undone."""

    def apply(self, tensors: Tensors, config: Config) -> None:
        """Replace the MLX tensors that this rule fits by those of the checkpoint, in place and lazily."""


def take(tensors: Tensors, pattern: str) -> Iterator[tuple[mx.array, dict[str, str]]]:
    """Every tensor whose name fits `pattern`, out of `tensors`, with what the placeholders stand for."""
    for name in list(tensors):
        if (found := fit(pattern, name)) is not None:
            yield tensors.pop(name), found


@dataclass(frozen=True, slots=True)
class Rename:
    """The same tensor under another name."""

    mlx: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for tensor, found in take(tensors, self.mlx):
            tensors[self.hf.format(**found)] = tensor


@dataclass(frozen=True, slots=True)
class Transpose:
    """A projection that the checkpoint stores [in, out]; the name stays."""

    mlx: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for tensor, found in take(tensors, self.mlx):
            tensors[self.mlx.format(**found)] = mx.contiguous(tensor.T)


@dataclass(frozen=True, slots=True)
class Convolution:
    """A depthwise convolution [channels, width, 1] that the checkpoint stores [channels, 1, width]; the name stays."""

    mlx: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for name in list(tensors):
            if fit(self.mlx, name) is not None:
                tensors[name] = mx.contiguous(tensors[name].swapaxes(1, 2))


@dataclass(frozen=True, slots=True)
class AsVector:
    """A single number that the checkpoint stores as a vector of one; the name stays."""

    mlx: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for name in list(tensors):
            if fit(self.mlx, name) is not None:
                tensors[name] = tensors[name].reshape(1)


@dataclass(frozen=True, slots=True)
class Unstack:
    """Stacked experts [experts, …], one tensor each in the checkpoint; `{e}` is the expert's number."""

    mlx: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for stack, found in take(tensors, self.mlx):
            for number in range(stack.shape[0]):
                tensors[self.hf.format(**found, e=number)] = stack[number]


@dataclass(frozen=True, slots=True)
class JoinHeads:
    """Multi-head latent attention: keys [heads, rank, nope] and values [heads, v, rank] are one matrix `kv_b_proj`."""

    keys: str
    values: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for keys, found in take(tensors, self.keys):
            values = tensors.pop(self.values.format(**found))
            both = mx.concatenate([keys.swapaxes(-1, -2), values], axis=1)
            tensors[self.hf.format(**found)] = both.reshape(-1, both.shape[-1])


@dataclass(frozen=True, slots=True)
class Interleave:
    """Gate and up projections of stacked experts, row by row in turn, transposed where they are matrices."""

    gate: str
    up: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for gate, found in take(tensors, self.gate):
            up = tensors.pop(self.up.format(**found))
            both = mx.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])
            tensors[self.hf.format(**found)] = both.swapaxes(-1, -2) if both.ndim == 3 else both


@dataclass(frozen=True, slots=True)
class StackHalves:
    """Gate and up projections of stacked experts, one after the other in one matrix for each expert."""

    gate: str
    up: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for gate, found in take(tensors, self.gate):
            up = tensors.pop(self.up.format(**found))
            tensors[self.hf.format(**found)] = mx.concatenate([gate, up], axis=1)


@dataclass(frozen=True, slots=True)
class TransposedExperts:
    """Stacked experts that the checkpoint stores [experts, in, out] under another name."""

    mlx: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for stack, found in take(tensors, self.mlx):
            tensors[self.hf.format(**found)] = stack.swapaxes(-1, -2)


def _experts(
    block: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), stack: str = "switch_mlp"
) -> tuple[Rule, ...]:
    base = f"model.layers.{{i}}.{block}"
    return tuple(
        Unstack(f"{base}.{stack}.{mlx}.weight", f"{base}.experts.{{e}}.{hf}.weight")
        for mlx, hf in zip(("gate_proj", "up_proj", "down_proj"), names, strict=True)
    )


_ATTENTION = "model.layers.{i}.self_attn"
_MLA: tuple[Rule, ...] = (
    JoinHeads(f"{_ATTENTION}.embed_q.weight", f"{_ATTENTION}.unembed_out.weight", f"{_ATTENTION}.kv_b_proj.weight"),
)
_GRANITE = "model.layers.{i}.block_sparse_moe"
_OSS = "model.layers.{i}.mlp.experts"
_LFM2 = "model.layers.{i}.feed_forward"
_LFM2_NAMES = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
_XIELU = "model.layers.{i}.mlp.act_fn"
_GPT2: tuple[Rule, ...] = (
    *(Transpose(f"model.h.{{i}}.{name}.weight") for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    Rename("model.{rest}", "{rest}"),
)
# `sanitize()` changes no name and no value of these (it drops precomputed rotary tables and tied heads)
_SAME = (
    "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_bigcode",
    "granite", "helium", "hunyuan_v1_dense", "llama", "ministral3", "mistral", "nemotron", "olmo2", "olmo3", "phi",
    "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip

FAMILIES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(_SAME, ()),
    "mixtral": _experts("block_sparse_moe", ("w1", "w3", "w2")),
    "phimoe": _experts("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": _experts("mlp"),
    "qwen3_moe": _experts("mlp"),
    "olmoe": _experts("mlp"),
    "glm4_moe": _experts("mlp"),
    "deepseek_v2": _experts("mlp"),
    "solar_open": _experts("mlp"),
    "exaone_moe": (
        *_experts("mlp"),
        Rename("model.layers.{i}.mlp.gate.e_score_correction_bias", "model.layers.{i}.mlp.e_score_correction_bias"),
    ),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm4_moe_lite"), (*_experts("mlp"), *_MLA)),
    "dots1": _experts("mlp", stack="experts"),
    "granitemoe": (
        StackHalves(
            f"{_GRANITE}.switch_mlp.gate_proj.weight",
            f"{_GRANITE}.switch_mlp.up_proj.weight",
            f"{_GRANITE}.input_linear.weight",
        ),
        Rename(f"{_GRANITE}.switch_mlp.down_proj.weight", f"{_GRANITE}.output_linear.weight"),
    ),
    "apertus": (AsVector(f"{_XIELU}.alpha_p"), AsVector(f"{_XIELU}.alpha_n")),
    "lfm2": (Convolution("model.layers.{i}.conv.conv.weight"),),
    "lfm2_moe": (
        Convolution("model.layers.{i}.conv.conv.weight"),
        *(
            rule
            for mlx, hf in _LFM2_NAMES
            for rule in (
                Unstack(f"{_LFM2}.switch_mlp.{mlx}.weight", f"{_LFM2}.experts.{{e}}.{hf}.weight"),
                Rename(f"{_LFM2}.{mlx}.weight", f"{_LFM2}.{hf}.weight"),
            )
        ),
    ),
    **dict.fromkeys(("mamba", "mamba2"), (Convolution("backbone.layers.{i}.mixer.conv1d.weight"),)),
    "gpt2": _GPT2,
    "gptj": (Rename("model.{rest}", "transformer.{rest}"),),
    "gpt_neox": (
        Rename("model.embed_out.{rest}", "embed_out.{rest}"),
        Rename("model.h.{rest}", "gpt_neox.layers.{rest}"),
        Rename("model.{rest}", "gpt_neox.{rest}"),
    ),
    "gpt_oss": (
        Interleave(f"{_OSS}.gate_proj.weight", f"{_OSS}.up_proj.weight", f"{_OSS}.gate_up_proj"),
        Interleave(f"{_OSS}.gate_proj.bias", f"{_OSS}.up_proj.bias", f"{_OSS}.gate_up_proj_bias"),
        TransposedExperts(f"{_OSS}.down_proj.weight", f"{_OSS}.down_proj"),
        Rename(f"{_OSS}.down_proj.bias", f"{_OSS}.down_proj_bias"),
    ),
}


def rules(config: Config) -> tuple[Rule, ...]:
    """The rules for a model. Raises UnsupportedError for an architecture whose inverse is not known."""
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"How '{kind}' stands in a Hugging Face checkpoint is not known here, so it is not exported: a wrong "
            f"layout would load without an error.{nearest(kind, list(FAMILIES))} Known: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[kind]


def to_checkpoint(tensors: Tensors, config: Config) -> Tensors:
    """The tensors of a Hugging Face checkpoint from those of the network (lazy). `tensors` stays as it is."""
    result = dict(tensors)
    for rule in rules(config):
        rule.apply(result, config)
    return result
