"""Quantization of a whole network: which layers, how many bits, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxlora import mlxlm
from mlxlora.adapters.weights import dense
from mlxlora.errors import ConfigError, UnsupportedError

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
Recipe = Literal["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]
# what MLX has kernels for: bits, group sizes (the first is the default)
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES: dict[str, tuple[int, ...]] = {"affine": (64, 32, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
MODE_BITS: dict[str, int] = {"mxfp4": 4, "mxfp8": 8, "nvfp4": 4}


@dataclass(frozen=True)
class QuantizeConfig:
    """How to quantize a model; with neither bits, mode nor recipe given, it is not quantized."""

    bits: int | None = None
    """2, 3, 4, 5, 6 or 8 (affine); the other modes have their own number and need none"""
    group_size: int | None = None
    """weights that share a scale: 32, 64 or 128 (affine, default 64); the other modes have their own"""
    mode: Mode = "affine"
    """affine (scale and offset), or the floating formats mxfp4, mxfp8, nvfp4"""
    recipe: Recipe | None = None
    """more bits for the layers that need them (affine only)"""

    def __post_init__(self) -> None:
        if self.mode not in GROUP_SIZES:
            raise ConfigError(f"quantize.mode must be one of {', '.join(GROUP_SIZES)}, not {self.mode!r}.")
        if self.group_size is not None and self.group_size not in GROUP_SIZES[self.mode]:
            allowed = " or ".join(map(str, sorted(GROUP_SIZES[self.mode])))
            raise ConfigError(f"quantize.group_size must be {allowed} for mode {self.mode}, not {self.group_size}.")
        if self.mode != "affine":
            if self.bits not in (None, MODE_BITS[self.mode]):
                raise ConfigError(f"quantize.bits: mode {self.mode} has {MODE_BITS[self.mode]} bits, not {self.bits}.")
            if self.recipe is not None:
                raise ConfigError(f"quantize.recipe {self.recipe} needs quantize.mode affine, not {self.mode}.")
        elif self.bits is not None and self.bits not in AFFINE_BITS:
            raise ConfigError(f"quantize.bits must be one of {', '.join(map(str, AFFINE_BITS))}, not {self.bits}.")
        elif self.recipe is not None and self.bits is not None:
            raise ConfigError(
                f"quantize.recipe {self.recipe} says the bits itself: leave quantize.bits ({self.bits}) out."
            )
        elif self.group_size is not None and not self.active:
            raise ConfigError("quantize.group_size says nothing without quantize.bits.")

    @property
    def active(self) -> bool:
        """Whether anything is to be quantized."""
        return self.bits is not None or self.mode != "affine" or self.recipe is not None

    @property
    def parameters(self) -> dict[str, Any]:
        """`group_size`, `bits` and `mode` as MLX takes them, defaults filled in."""
        bits = MODE_BITS.get(self.mode) or self.bits or int((self.recipe or "mixed_4_6").split("_")[1])
        return {"group_size": self.group_size or GROUP_SIZES[self.mode][0], "bits": bits, "mode": self.mode}

    def __str__(self) -> str:
        said = self.parameters
        return f"{self.recipe or str(said['bits']) + ' bits'}, groups of {said['group_size']}, {self.mode}"


@dataclass(frozen=True, slots=True)
class Kept:
    """A layer that stays as it was, and why."""

    path: str
    reason: str


def quantize(network: nn.Module, config: dict[str, Any], wanted: QuantizeConfig) -> tuple[dict[str, Any], list[Kept]]:
    """Quantize a network in place (lazily). Returns its new configuration and the layers that could not be quantized.

    A model that has its own opinion (routers of experts, for example, stay as they are) is heard.
    Raises UnsupportedError when it is quantized already, or when no layer can be.
    """
    if "quantization" in config or any("scales" in module for _, module in network.named_modules()):
        raise UnsupportedError(
            "The model is quantized already. Convert it with --dequantize first, then quantize that."
        )
    parameters = wanted.parameters
    opinion: Callable[[str, nn.Module], bool | dict[str, Any]] | None = getattr(network, "quant_predicate", None)
    if wanted.recipe is not None:
        opinion = _both(opinion, mlxlm.mixed_recipe(wanted.recipe, network, parameters["group_size"]))
    quantization: dict[str, Any] = dict(parameters)
    kept: list[Kept] = []
    done = 0

    def decide(path: str, module: nn.Module) -> bool | dict[str, Any]:
        nonlocal done
        if not hasattr(module, "to_quantized"):
            return False
        answer: bool | dict[str, Any] = True if opinion is None else opinion(path, module)
        if not answer:
            return False
        group = answer["group_size"] if isinstance(answer, dict) else parameters["group_size"]
        width = module.weight.shape[-1]
        if width % group:
            kept.append(Kept(path, f"its width {width} is not divisible by the group size {group}"))
            return False
        done += 1
        if isinstance(answer, dict):
            own = {**parameters, **answer}
            quantization[path] = own
            return own
        return True

    nn.quantize(network, **parameters, class_predicate=decide)
    if not done:
        reasons = "; ".join(f"{one.path}: {one.reason}" for one in kept[:3]) or "it has no layer that can be quantized"
        raise UnsupportedError(f"No layer of this model can be quantized ({wanted}): {reasons}.")
    return {**config, "quantization": quantization, "quantization_config": quantization}, kept


def _both(
    first: Callable[[str, nn.Module], bool | dict[str, Any]] | None,
    second: Callable[[str, nn.Module], bool | dict[str, Any]],
) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """The model's own opinion where it has one that says more than yes, else the recipe's."""
    if first is None:
        return second

    def decide(path: str, module: nn.Module) -> bool | dict[str, Any]:
        answer = first(path, module)
        return second(path, module) if answer is True else answer

    return decide


def dequantize(network: nn.Module, config: dict[str, Any], dtype: mx.Dtype | None = None) -> dict[str, Any]:
    """Replace every quantized layer by its plain form, in place (lazily). Returns the configuration without it.

    dtype: of the weights (default: the dtype of the scales, or bfloat16 where these are packed themselves)
    Raises UnsupportedError when nothing is quantized, or when a layer is of a kind whose plain form is not known.
    """
    plain: list[tuple[str, nn.Module]] = []
    unknown = []
    for path, module in network.named_modules():
        if "scales" not in module:
            continue
        made = _plain(module, dtype)
        if made is None:
            unknown.append(f"{path} ({type(module).__name__})")
        else:
            plain.append((path, made))
    if unknown:
        raise UnsupportedError(f"The plain form of these layers is not known: {', '.join(unknown[:5])}.")
    if not plain:
        raise UnsupportedError("The model is not quantized: there is nothing to dequantize.")
    network.update_modules(tree_unflatten(plain))
    return {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}


def _plain(module: nn.Module, dtype: mx.Dtype | None) -> nn.Module | None:
    experts, heads = mlxlm.switch_layers(), mlxlm.module("models.mla")
    packed_scales: mx.array = module["scales"]
    natural = packed_scales.dtype if mx.issubdtype(packed_scales.dtype, mx.floating) else mx.bfloat16
    weight = dense(module).astype(dtype or natural)
    bias = "bias" in module
    made: nn.Module
    if isinstance(module, nn.QuantizedLinear):
        made = nn.Linear(1, 1, bias=bias)
    elif isinstance(module, nn.QuantizedEmbedding):
        made = nn.Embedding(1, 1)
    elif isinstance(module, experts.QuantizedSwitchLinear):
        made = experts.SwitchLinear(1, 1, 1, bias=bias)
    elif isinstance(module, heads.QuantizedMultiLinear):
        made = heads.MultiLinear(1, 1, 1)
    else:
        return None
    made["weight"] = weight
    if bias:
        made["bias"] = module["bias"]
    made.train(module.training)
    return made
