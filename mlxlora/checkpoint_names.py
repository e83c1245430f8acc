"""Tensors of Hugging Face checkpoints that mlx-lm's own `sanitize()` does not know, brought into a form that it does.

One entry a family: newer transformers, or another class of the same model, saves it in another way than the file that
mlx-lm's author had at hand. Everything here is a renaming or a view: no number changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.parameters import flat

Tensors = dict[str, mx.array]


def prepared(network: nn.Module, config: dict[str, Any], tensors: Tensors) -> Tensors:
    """The tensors of a checkpoint as the `sanitize()` of `network` expects them."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None:
        tensors = family(tensors)
    return _without_tied_head(network, tensors)


def _without_tied_head(network: nn.Module, tensors: Tensors) -> Tensors:
    """Drop `lm_head.weight` where the network has none and it says what the embedding says anyway."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is None or embedding is None or "lm_head.weight" in flat(network.parameters()):
        return tensors
    if head.shape != embedding.shape or not bool(mx.array_equal(head, embedding)):
        return tensors  # the check of the names will say that it does not fit
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def _gpt2(tensors: Tensors) -> Tensors:
    """GPT2LMHeadModel saves `transformer.h…` where GPT2Model saves `h…`; masks are saved beside the weights."""
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    buffers = (".attn.bias", ".attn.masked_bias")
    tied = "lm_head.weight"
    return {name: tensor for name, tensor in named.items() if name != tied and not name.endswith(buffers)}


def _gpt_oss(tensors: Tensors) -> Tensors:
    """Experts that are not packed as mxfp4: `gate_up_proj` [experts, in, 2·out], gate and up interleaved."""
    if not any(name.endswith("experts.gate_up_proj") for name in tensors):
        return tensors
    result: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            both = tensor.swapaxes(-1, -2)
            result[name.replace("gate_up_proj", "gate_proj.weight")] = mx.contiguous(both[:, ::2])
            result[name.replace("gate_up_proj", "up_proj.weight")] = mx.contiguous(both[:, 1::2])
        elif name.endswith("experts.down_proj"):
            result[f"{name}.weight"] = mx.contiguous(tensor.swapaxes(-1, -2))
        elif name.endswith("experts.gate_up_proj_bias"):
            result[name.replace("gate_up_proj_bias", "gate_proj.bias")] = mx.contiguous(tensor[:, ::2])
            result[name.replace("gate_up_proj_bias", "up_proj.bias")] = mx.contiguous(tensor[:, 1::2])
        elif name.endswith("experts.down_proj_bias"):
            result[name.replace("down_proj_bias", "down_proj.bias")] = tensor
        else:
            result[name] = tensor
    return result


FAMILIES: dict[str, Callable[[Tensors], Tensors]] = {"gpt2": _gpt2, "gpt_oss": _gpt_oss}
