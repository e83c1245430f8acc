"""Rotary embeddings between config.json and GGUF: base, width, and the scalings of longer contexts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxlora.errors import FormatError, Problem
from mlxlora_convert.gguf_header import GGUFHeader

Floats = NDArray[np.float32]
DEFAULT_THETA = {"qwen2": 1e6, "qwen2_moe": 1e6, "mixtral": 1e6, "cohere": 8e6, "starcoder2": 1e5, "gemma3_text": 1e6}
PARTIAL = ("stablelm", "phi3")  # the families whose MLX model rotates a part of each head
FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
YARN_RAMP = {"beta_fast": 32.0, "beta_slow": 1.0}
LLAMA3_CONTEXT = 8192


def scaling_of(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of rope scaling (`default` for none) and its settings, in either spelling of config.json."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        return "default", {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return {"su": "longrope"}.get(kind, kind), scaling


def problems(config: dict[str, Any], possible: tuple[str, ...]) -> list[Problem]:
    """What cannot be said about the rotation of this model."""
    kind, scaling = scaling_of(config)
    if kind == "default":
        return []
    if kind not in possible:
        have = ", ".join(possible) or "none"
        return [Problem("rope_scaling", f"'{kind}' on a {config['model_type']} model", f"Possible there: {have}")]
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor", "original_max_position_embeddings"),
        "longrope": ("long_factor", "short_factor"),
    }[kind]
    found = [Problem(f"rope_scaling.{name}", "missing") for name in needed if scaling.get(name) is None]
    if kind == "yarn":
        given = scaling.get("attention_factor")
        if given is not None and not found and abs(given - yarn_mscale(scaling)) > 1e-6:
            found.append(Problem("rope_scaling.attention_factor", f"is {given}, which MLX's model does not apply"))
        for name, usual in YARN_RAMP.items():
            if scaling.get(name) not in (None, usual):
                what = f"is {scaling[name]}, llama.cpp takes {usual:g} whatever the file says"
                found.append(Problem(f"rope_scaling.{name}", what))
        if scaling.get("truncate") is False:
            found.append(Problem("rope_scaling.truncate", "is false, which neither MLX nor llama.cpp do"))
    if kind == "longrope" and not found:
        half = rotated(config, 0) // 2
        found += [
            Problem(f"rope_scaling.{name}", f"{len(scaling[name])} factors, expected {half}")
            for name in needed
            if len(scaling[name]) != half
        ]
    return found


def rotated(config: dict[str, Any], head: int) -> int:
    """How many of a head's dimensions rotate."""
    head = head or int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    share = config.get("partial_rotary_factor") if config["model_type"] in PARTIAL else 1.0
    return int(head * float(share if share is not None else 1.0))


def theta(config: dict[str, Any]) -> float:
    """The base of the rotation."""
    given = config.get("rope_theta")
    return float(given if given is not None else DEFAULT_THETA.get(config["model_type"], 1e4))


def yarn_mscale(scaling: dict[str, Any]) -> float:
    """The factor that YaRN (Peng et al. 2023) puts on queries and keys, as MLX computes it."""

    def mscale(weight: float) -> float:
        factor = float(scaling["factor"])
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return mscale(float(scaling.get("mscale", 1.0))) / mscale(float(scaling.get("mscale_all_dim", 0.0)))


def longrope_mscale(config: dict[str, Any]) -> float:
    """The factor that longrope puts on queries and keys."""
    factor = config["max_position_embeddings"] / original_context(config)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_context(config)))


def original_context(config: dict[str, Any]) -> int:
    """The context that a longrope model was first trained with."""
    scaling = scaling_of(config)[1]
    given = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    return int(given or 4096)


def metadata(architecture: str, config: dict[str, Any], head: int) -> dict[str, tuple[str, Any]]:
    """GGUF's keys for the rotation of a model."""
    kind, scaling = scaling_of(config)
    values: dict[str, tuple[str, Any]] = {
        "dimension_count": ("uint32", rotated(config, head)),
        "freq_base": ("float32", theta(config)),
    }
    if kind in ("linear", "yarn"):
        values |= {"scaling.type": ("string", kind), "scaling.factor": ("float32", float(scaling["factor"]))}
    if kind == "yarn":
        original = int(scaling["original_max_position_embeddings"])
        values["scaling.original_context_length"] = ("uint32", original)
        usual = yarn_mscale({"factor": scaling["factor"]})
        if abs(yarn_mscale(scaling) - usual) > 1e-6:  # llama.cpp multiplies the usual one with this
            values["scaling.attn_factor"] = ("float32", yarn_mscale(scaling) / usual)
    if kind == "longrope":
        values["scaling.type"] = ("string", kind)
        values["scaling.original_context_length"] = ("uint32", original_context(config))
        values["scaling.attn_factor"] = ("float32", longrope_mscale(config))
    return {f"{architecture}.rope.{key}": value for key, value in values.items()}


def tensors(config: dict[str, Any]) -> dict[str, Floats]:
    """The frequency factors that GGUF keeps as tensors: llama3's, or longrope's two sets."""
    kind, scaling = scaling_of(config)
    if kind == "llama3":
        return {FACTORS: llama3_factors(scaling, theta(config), rotated(config, 0))}
    if kind == "longrope":
        return {
            LONG: np.asarray(scaling["long_factor"], dtype=np.float32),
            SHORT: np.asarray(scaling["short_factor"], dtype=np.float32),
        }
    return {}


def llama3_factors(scaling: dict[str, Any], base: float, width: int) -> Floats:
    """What Llama 3.1's scaling stretches each wavelength by: short ones 1, long ones `factor`, a blend between."""
    wavelengths = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(scaling["original_max_position_embeddings"])
    blend = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - blend) / factor + blend)
    stretched = np.where(wavelengths > context / low, factor, np.where(wavelengths < context / high, 1.0, between))
    return stretched.astype(np.float32)


def llama3_settings(factors: Floats, base: float, width: int) -> dict[str, Any] | None:
    """The settings that give these factors, or None when Llama 3's scaling does not give them."""
    factor = float(factors.max())
    settings = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
    between = (factors > 1.0 + 1e-5) & (factors < factor * (1 - 1e-5))
    if between.sum() >= 2:
        wavelengths = (2 * math.pi * base ** (np.arange(0, width, 2) / width))[between]
        blend = (1 / factors[between].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(
            LLAMA3_CONTEXT / wavelengths, blend, 1
        )  # blend = (context/wavelength - low) / (high - low)
        low = -start / slope
        settings |= {"low_freq_factor": round(float(low), 4), "high_freq_factor": round(float(low + 1 / slope), 4)}
    again = llama3_factors(settings, base, width)
    return settings if np.allclose(again, factors, rtol=1e-4) else None


def configuration(
    header: GGUFHeader, architecture: str, config: dict[str, Any], take: Callable[[str, str], Any]
) -> dict[str, Any]:
    """config.json's keys for the rotation of the model in a GGUF file, in both spellings.

    Raises FormatError for a scaling that has no counterpart.
    """
    from mlxlora_convert.gguf_read import float_tensor

    head = int(config["head_dim"])
    base = take("rope.freq_base", "float32")
    base = float(base) if base is not None else 1e4
    width = take("rope.dimension_count", "uint32") or head
    found: dict[str, Any] = {"rope_theta": base}
    if config["model_type"] in PARTIAL:
        found["partial_rotary_factor"] = width / head
    elif width != head:
        raise FormatError.of(
            f"{header.path}: rotation", [Problem(f"{architecture}.rope.dimension_count", f"{width}, expected {head}")]
        )
    kind = header.metadata.get(f"{architecture}.rope.scaling.type", "none")
    scaling: dict[str, Any] = {}
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": float(take("rope.scaling.factor", "float32") or 1.0)}
    if kind == "yarn":
        original = take("rope.scaling.original_context_length", "uint32")
        scaling["original_max_position_embeddings"] = original or config["max_position_embeddings"]
        extra = take("rope.scaling.attn_factor", "float32")
        if extra is not None and abs(extra - 1) > 1e-6:
            wanted = extra * yarn_mscale(scaling)
            scaling["mscale"] = (wanted - 1) / (0.1 * math.log(scaling["factor"]))
    if FACTORS in header.tensors:
        settings = llama3_settings(float_tensor(header, FACTORS), base, width)
        if settings is None:
            raise FormatError.of(f"{header.path}: rotation", [Problem(FACTORS, "these factors are not Llama 3's")])
        scaling = settings
    if LONG in header.tensors and SHORT in header.tensors:
        original = take("rope.scaling.original_context_length", "uint32") or 4096
        scaling = {
            "rope_type": "longrope",
            "long_factor": float_tensor(header, LONG).tolist(),
            "short_factor": float_tensor(header, SHORT).tolist(),
            "original_max_position_embeddings": original,
        }
        found["original_max_position_embeddings"] = original
    elif kind not in ("none", "linear", "yarn") and not scaling:
        raise FormatError.of(f"{header.path}: rotation", [Problem(f"{architecture}.rope.scaling.type", f"'{kind}'")])
    if scaling:
        found["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
    return found
