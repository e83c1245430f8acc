"""Fold adapters into the weights of a model, and measure what that changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora import files, hub, probe
from mlxlora import model as models
from mlxlora import weights as weight_files
from mlxlora.adapters import weights
from mlxlora.adapters.files import parse_spec
from mlxlora.adapters.heads import in_place
from mlxlora.adapters.inject import get_module, set_module
from mlxlora.adapters.layer import base_of
from mlxlora.commands import command
from mlxlora.errors import ConfigError, InputError, MlxLoraError
from mlxlora.fusing import writing
from mlxlora.fusing.divergence import find_probe
from mlxlora.fusing.forms import Tried, automatic_forms, choose, forced_forms, quantization_entries
from mlxlora.parameters import bytes_of
from mlxlora.progress import Progress


@dataclass(frozen=True)
class FuseResult:
    """What fusing came to."""

    out: Path
    """the new model directory"""
    adapters: dict[str, float]
    """the adapters that were folded in, with their scales"""
    layers: int
    """how many layers (for full fine-tuning: weights) changed"""
    form: str
    """in which form the adapted layers are stored"""
    kl: float
    """mean divergence from the adapter on its base, in nats a token"""
    max_kl: float
    """the bound that was to be kept"""
    difference: probe.Difference
    """all that was measured"""
    tried: list[Tried]
    """every form that was measured, the cheapest first"""
    probe: str
    """the text that it was measured on"""
    bytes_before: int
    """size of the weight files of the base"""
    bytes: int
    """size of the new weight files"""
    check: str
    """what the reader said that the result was checked with"""

    def __str__(self) -> str:
        names = ", ".join(f"{name} × {scale:g}" for name, scale in self.adapters.items())
        lines = [f"{self.out}: {self.layers} layers changed by {names}"]
        if self.layers:
            lines += [f"  {one.name}: KL {one.difference.kl:.2g} nats a token" for one in self.tried]
            lines.append(f"Against the adapter on its base: {self.difference}")
            lines.append(f"Measured on {self.probe}")
            if self.kl > self.max_kl:
                lines.append(f"This is more than the bound of {self.max_kl:g}, as accepted.")
        lines.append(f"{files.human_bytes(self.bytes_before)} → {files.human_bytes(self.bytes)}")
        lines += [self.check] if self.check else []
        return "\n".join([*lines, "", f"next: {command('chat', model=self.out)}"])


def fuse(
    model: str,
    adapter: list[str],
    out: Path,
    *,
    dequantize: bool = False,
    bits: int | None = None,
    max_kl: float = 0.01,
    probe: Path | None = None,
    accept_loss: bool = False,
    any_base: bool = False,
    check: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
) -> FuseResult:
    """Fold one or several adapters into a model: a model directory for mlxlora and for stock mlx-lm.

    On a quantized base the result is held against the adapter on its base, and the cheapest form that stays under
    `max_kl` is taken: the bits that the layers have; the same with error-aware rounding; more bits for the adapted
    layers; these layers unquantized. An adapter without effect changes no byte.

    Args:
        model: a model directory, or a model on the Hugging Face hub
        adapter: adapters or runs; `PATH=SCALE` gives one another strength than 1
        out: the model directory to write; it must not exist
        dequantize: store the whole model unquantized
        bits: store the adapted layers in so many bits
        max_kl: how far the result may be from the adapter on its base, in nats a token
        probe: text to measure on, in any format that training takes; when left out, the validation rows of the run
        accept_loss: write the result even when it is further away than `max_kl`
        any_base: fold an adapter into another base than that which it was made for
        check: read the result back by mlx-lm before it is published
        revision: branch, tag or commit on the hub
        trust_remote_code: allow the model to run Python code of its own

    Raises:
        InputError: `out` exists, or an adapter is damaged or does not fit
        MlxLoraError: the bound cannot be kept in the form that was asked for (exit code 1)
    """
    out = Path(out)
    if not max_kl >= 0:
        raise ConfigError(f"max_kl is {max_kl:g}, but must be 0 or more.")
    if not adapter:
        raise ConfigError("No adapter was given: --adapter PATH or PATH=SCALE.")
    path = hub.find(model, revision=revision)
    _refuse_target(out, path)
    language_model = models.load(path, trust_remote_code=trust_remote_code, lazy=True)
    adapters = language_model.adapters
    for spec in adapter:
        place, scale = parse_spec(spec)
        adapters.add(place, scale=scale, any_base=any_base)
    slots = in_place(language_model.network)
    kinds = list({kind for slot in slots.values() if (kind := weights.quantization(slot.base)) is not None})
    forced = dequantize or bits is not None
    forms = forced_forms(kinds, bits, dequantize) if forced else automatic_forms(kinds)
    text = find_probe(language_model, probe, [parse_spec(spec)[0] for spec in adapter])
    network = language_model.network
    modules, tried = choose(network, forms, text.measured, text.calibration, max_kl, on_progress)
    chosen = min(tried, key=lambda one: one.difference.kl)
    if chosen.difference.kl > max_kl and not accept_loss:
        raise MlxLoraError(_too_far(tried, max_kl, forced))
    scales = adapters.scales
    changed = _settle(language_model, modules)
    files.require_space(out, bytes_of(network.parameters()), "the fused model")
    with files.new_directory(out) as scratch:
        entries = None if dequantize else _changed_entries(path, modules)
        writing.write_model(scratch, path, network, language_model.config, changed, entries)
        said = ""
        if check:
            said = writing.read_back(scratch, network, text.measured, trust_remote_code=trust_remote_code)
        size = _bytes(scratch)
    return FuseResult(
        out=out,
        adapters=scales,
        layers=len(changed),
        form=chosen.name if changed else "unchanged",
        kl=chosen.difference.kl,
        max_kl=max_kl,
        difference=chosen.difference,
        tried=tried,
        probe=text.origin,
        bytes_before=_bytes(path),
        bytes=size,
        check=said,
    )


def _refuse_target(out: Path, source: Path) -> None:
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise InputError(f"{out} is the model itself, or lies inside of it. Choose another place.")
    files.refuse_existing(out)


def _too_far(tried: list[Tried], max_kl: float, forced: bool) -> str:
    told = "; ".join(f"{one.name}: {one.difference.kl:.2g}" for one in tried)
    advice = "leave --bits and --dequantize out and the cheapest form that keeps it is found, or " if forced else ""
    return (
        f"Fusing would change what the adapter does by more than {max_kl:g} nats a token ({told}). Nothing "
        f"was written. To go on, {advice}allow more with --max_kl, or take it as it is with --accept_loss."
    )


def _settle(language_model: models.LanguageModel, modules: dict[str, Any]) -> set[str]:
    """Make the network what it is to be: adapters gone, their effects in the weights. Returns what changed."""
    network = language_model.network
    whole: dict[str, mx.array] = {}
    for live in language_model.adapters:
        if live.scale:
            for name in live.adapter.weights:
                place, _, leaf = name.rpartition(".")
                whole[name] = base_of(get_module(network, place))[leaf]
    language_model.adapters.clear()
    changed = set(modules)
    for name, array in whole.items():
        place, _, leaf = name.rpartition(".")
        owner = base_of(get_module(network, place))
        if place in modules or mx.array_equal(owner[leaf], array).item():
            continue
        owner[leaf] = array
        changed.add(name)
    for path, module in modules.items():
        set_module(network, path, module)
    return changed


def _changed_entries(source: Path, modules: dict[str, Any]) -> dict[str, Any]:
    """The quantization entries of the changed layers, when any of them is stored otherwise than before."""
    config = files.read_json(source / "config.json")
    if "quantization" not in config and "quantization_config" not in config:
        return {}
    return quantization_entries(modules)


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in weight_files.weight_files(directory))
