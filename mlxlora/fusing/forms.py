"""The forms in which an adapter can be folded into a quantized model, from the cheapest to the surest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora import probe
from mlxlora.adapters import weights
from mlxlora.adapters.heads import in_place
from mlxlora.adapters.layer import Wrapper, base_of
from mlxlora.adapters.weights import Quantization
from mlxlora.errors import ConfigError
from mlxlora.fusing.divergence import measure
from mlxlora.fusing.inputs import moments
from mlxlora.fusing.rounding import pack_with_care
from mlxlora.parameters import bytes_of, flat
from mlxlora.progress import Progress

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits that MLX's affine mode has


@dataclass(frozen=True, slots=True)
class Form:
    """One way to fold the adapter into the adapted layers.

    name:     as people read it
    packed:   what a quantized layer becomes: a quantization, None for none
    careful:  round so that the outputs stay, rather than each weight
    everywhere: unpack the layers without an adapter, too
    """

    name: str
    packed: Callable[[Quantization], Quantization | None]
    careful: bool = False
    everywhere: bool = False


@dataclass(frozen=True, slots=True)
class Tried:
    """What a form came to: its size in bytes (adapted layers) and how far it is from the adapter on its base."""

    name: str
    bytes: int
    difference: probe.Difference


def automatic_forms(kinds: Sequence[Quantization]) -> list[Form]:
    """The forms to try for layers of these quantizations, the cheapest first."""
    if not kinds:
        return [Form("as the base", lambda packed: packed)]
    forms = _both("same bits", lambda packed: packed)
    steps = max(len(wider(kind)) for kind in kinds)
    for step in range(steps):
        names = ", ".join(sorted({_label(_wider_by(kind, step)) for kind in kinds}))
        forms += _both(f"adapted layers in {names}", functools.partial(_wider_by, step=step))
    forms.append(Form("adapted layers unquantized", lambda packed: None))
    return forms


def forced_forms(kinds: Sequence[Quantization], bits: int | None, dequantize: bool) -> list[Form]:
    """The forms that `--bits` or `--dequantize` leave to try.

    Raises ConfigError when they contradict each other or the base.
    """
    if bits is not None and dequantize:
        raise ConfigError("--bits and --dequantize contradict each other: choose one.")
    if not kinds:
        what = "--bits" if bits is not None else "--dequantize"
        raise ConfigError(f"{what} means nothing here: no adapted layer is quantized.")
    if dequantize:
        return [Form("unquantized", lambda packed: None, everywhere=True)]
    if bits not in WIDTHS:
        raise ConfigError(f"bits must be one of {', '.join(map(str, WIDTHS))}, not {bits}.")

    def at(packed: Quantization) -> Quantization:
        if packed.bits == bits:
            return packed
        return Quantization(packed.group_size if packed.mode == "affine" else 32, bits)

    names = ", ".join(sorted({_label(at(kind)) for kind in kinds}))
    return _both(f"adapted layers in {names}", at)


def _both(name: str, packed: Callable[[Quantization], Quantization | None]) -> list[Form]:
    """Rounded to nearest, which is quick, and with care, which takes as many bytes."""
    return [Form(name, packed), Form(f"{name}, error-aware rounding", packed, careful=True)]


def wider(packed: Quantization) -> list[Quantization]:
    """The quantizations with more bits that come after this one, the smallest first."""
    if packed.mode == "affine":
        return [Quantization(packed.group_size, bits) for bits in WIDTHS if bits > packed.bits]
    if packed.mode == "mxfp8":
        return [Quantization(32, 8)]
    return [Quantization(32, 5), Quantization(32, 6), Quantization(32, 8)]


def _wider_by(packed: Quantization, step: int) -> Quantization | None:
    ladder = wider(packed)
    return ladder[step] if step < len(ladder) else None


def _label(packed: Quantization | None) -> str:
    if packed is None:
        return "no quantization"
    return f"{packed.bits} bits" if packed.mode == "affine" else packed.mode


def build(
    network: nn.Module,
    form: Form,
    calibration: Sequence[list[int]],
    on_progress: Progress | None = None,
) -> dict[str, nn.Module]:
    """The plain layers for the places of the adapted ones in this form, by path. The network stays as it is."""
    slots = {path: layer for path, layer in in_place(network).items() if layer.changes()}
    made: dict[str, nn.Module] = {}
    natural = network_dtype(network)
    wanted = {path: _wanted(slot, form) for path, slot in slots.items()}
    careful = sorted(path for path, packed in wanted.items() if form.careful and packed)

    def done() -> None:
        if on_progress:
            on_progress(f"fusing: {form.name}", len(made), len(slots))

    for path in sorted(slots.keys() - set(careful)):
        slot = slots[path]
        kept = natural if weights.quantization(slot.base) else None  # else the layer says it
        made[path] = _evaluated(weights.like(slot.base, slot.adapted(), wanted[path], kept))
        done()
    for path, inputs in moments(network, careful, calibration):
        base, target, packed = slots[path].base, slots[path].adapted(), wanted[path]
        if packed != weights.quantization(base):
            base = weights.like(base, target, packed, natural)
        made[path] = _evaluated(pack_with_care(base, target, inputs))
        done()
    if form.everywhere:
        made |= {path: _evaluated(layer) for path, layer in _unpacked(network, set(slots), natural)}
    return dict(sorted(made.items()))


def _wanted(slot: Wrapper, form: Form) -> Quantization | None:
    """The quantization of a layer in a form; None where it has none, or cannot be packed in groups of that size."""
    packed = weights.quantization(slot.base)
    wanted = form.packed(packed) if packed else None
    return wanted if wanted and weights.shape(slot.base)[-1] % wanted.group_size == 0 else None


def _unpacked(network: nn.Module, but: set[str], natural: mx.Dtype) -> Iterator[tuple[str, nn.Module]]:
    """Plain forms of the quantized layers that no adapter changes."""
    modules = dict(network.named_modules())
    for path, module in modules.items():
        if path in but or isinstance(modules.get(path.rpartition(".")[0]), Wrapper):
            continue
        plain = base_of(module)
        known = (weights.is_linear, weights.is_embedding, weights.is_experts, weights.is_half)
        if any(is_one(plain) for is_one in known) and weights.quantization(plain):
            yield path, weights.like(plain, weights.dense(plain), None, natural)


def _evaluated(layer: nn.Module) -> nn.Module:
    mx.eval(layer.parameters())
    mx.clear_cache()
    return layer


def network_dtype(network: nn.Module) -> mx.Dtype:
    """The dtype that a network computes in: that of most of its arrays that are neither packed nor float scales."""
    sizes: dict[mx.Dtype, int] = {}
    for name, array in flat(network.parameters()).items():
        if mx.issubdtype(array.dtype, mx.floating) and not name.endswith("global_scale"):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return max(sizes, key=lambda dtype: sizes[dtype], default=mx.float32)


def choose(
    network: nn.Module,
    forms: Sequence[Form],
    rows: Sequence[list[int]],
    calibration: Sequence[list[int]],
    max_kl: float,
    on_progress: Progress | None = None,
) -> tuple[dict[str, nn.Module], list[Tried]]:
    """The layers in the first form that stays under the bound (else in the nearest one), and all forms tried."""
    tried: list[Tried] = []
    best: dict[str, nn.Module] = {}
    for form in forms:
        modules = build(network, form, calibration, on_progress)
        difference = measure(network, modules, rows)
        size = sum(bytes_of(module.parameters()) for module in modules.values())
        if not tried or difference.kl < min(one.difference.kl for one in tried):
            best = modules
        tried.append(Tried(form.name, size, difference))
        if difference.kl <= max_kl:
            break
    return best, tried


def quantization_entries(modules: dict[str, nn.Module]) -> dict[str, Any]:
    """What config.json says about each of these layers: how it is quantized, or False."""
    found = {path: weights.quantization(module) for path, module in modules.items()}
    return {path: packed.as_config() if packed else False for path, packed in found.items()}
