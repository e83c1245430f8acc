"""Between a network that carries an adapter and an adapter by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import full, weights
from mlxlora.adapters.files import Adapter, Module, fitted, read_adapter
from mlxlora.adapters.inject import Injection, get_module, injected
from mlxlora.adapters.kinds import can_carry
from mlxlora.adapters.layer import AdapterLayer, base_of
from mlxlora.adapters.select import block_paths
from mlxlora.errors import AdapterError, ConfigError, Problem
from mlxlora.files import plain


def collect(network: nn.Module, *, base: str | None = None, base_name: str = "") -> Adapter:
    """The adapter that was injected into `network`, as it stands now.

    base, base_name: fingerprint and name of the model, for the manifest
    """
    injection = _injection(network)
    settings: dict[str, Any] = plain(injection.config)
    common: dict[str, Any] = {
        "base": base, "base_name": base_name, "config": settings, "layers": len(block_paths(network)),
    }  # fmt: skip
    if injection.config.type == "full":
        learned = {name: array for one in injection.opened for name, array in full.learned(one).items()}
        return Adapter("full", weights=learned, **common)
    modules = {}
    for path in injection.paths:
        layer = get_module(network, path)
        assert isinstance(layer, AdapterLayer)
        modules[path] = Module({name: layer[name] for name in layer.learned}, layer.scale)
    return Adapter(injection.config.type, modules, dropout=injection.config.dropout, **common)


def load_adapter(network: nn.Module, adapter: Adapter | str | Path, *, base: str | None = None) -> Adapter:
    """Give the adapter that was injected into `network` the values of another one, to go on training from it.

    Ranks may be smaller than those injected (the rest is filled with zeros); paths and type must be the same.
    Raises AdapterError, naming every difference.
    """
    injection = _injection(network)
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter)
    problems = _differences(network, injection, adapter)
    if problems:
        made = _settings_apart(adapter, injection)
        raise AdapterError.of(f"The adapter is not of the kind that was set up for training{made}:", problems)
    check_fits(network, adapter, base=base)
    if adapter.type == "full":
        by_path = {one.path: one for one in injection.opened}
        for name, array in adapter.weights.items():
            path, _, leaf = name.rpartition(".")
            by_path[path].module[leaf] = array.astype(mx.float32)
        return adapter
    for path, module in adapter.modules.items():
        layer = get_module(network, path)
        assert isinstance(layer, AdapterLayer)
        for name, array in fitted(module, layer.rank, layer.scale).items():
            layer[name] = array
    return adapter


def _injection(network: nn.Module) -> Injection:
    injection = injected(network)
    if injection is None:
        raise ConfigError("The model carries no adapter that trains. Call inject first.")
    return injection


def _settings_apart(adapter: Adapter, injection: Injection) -> str:
    """How the adapter was made where that is another way than the one set up, as flags."""
    here: dict[str, Any] = plain(injection.config)
    kinds = ("type", "targets", "layers", "rank", "rank_pattern")
    apart = {
        name: adapter.config[name] for name in kinds if name in adapter.config and adapter.config[name] != here[name]
    }
    words = [
        f"--adapter.{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in apart.items()
    ]
    return f" (it was made with {' '.join(words)})" if words else ""


def _differences(network: nn.Module, injection: Injection, adapter: Adapter) -> list[Problem]:
    if adapter.type != injection.config.type:
        return [Problem("type", f"expected {injection.config.type}, found {adapter.type}")]
    if adapter.type == "full":
        expected = {name for one in injection.opened for name in one.names}
    else:
        expected = set(injection.paths)
    found = set(adapter.paths)
    problems = [Problem(path, "set up for training, but not in the adapter") for path in sorted(expected - found)]
    problems += [Problem(path, "in the adapter, but not set up for training") for path in sorted(found - expected)]
    for path, module in adapter.modules.items():
        if path in expected and module.rank > get_module(network, path).rank:
            problems.append(Problem(path, f"has rank {module.rank}, which is more than was set up"))
    return problems


def check_fits(network: nn.Module, adapter: Adapter, *, base: str | None = None) -> None:
    """Raise AdapterError, with all problems at once, when `adapter` was not made for this network.

    base: the fingerprint of the model; compared where the adapter names the one that it was made for
    """
    problems = []
    if base is not None and adapter.base is not None and adapter.base != base:
        made_for = f"{adapter.base_name or 'another model'} ({adapter.base[:12]}…)"
        advice = "Where the two differ in quantization alone, it can be folded in: mlxlora fuse --any_base"
        problems.append(Problem("base", f"the adapter was made for {made_for}, this model is {base[:12]}…", advice))
    if adapter.type == "full":
        problems += _full_problems(network, adapter)
    else:
        for path, module in sorted(adapter.modules.items()):
            problems += _module_problems(network, path, module, adapter.type)
    if problems:
        raise AdapterError.of("The adapter does not fit this model:", problems)


def _full_problems(network: nn.Module, adapter: Adapter) -> list[Problem]:
    problems = []
    if adapter.base is None:
        problems.append(
            Problem("base", "an adapter of type full that does not name its base would replace any weights")
        )
    for name, array in sorted(adapter.weights.items()):
        path, _, leaf = name.rpartition(".")
        try:
            own = base_of(get_module(network, path)).get(leaf)
        except KeyError:
            own = None
        if not isinstance(own, mx.array):
            problems.append(Problem(name, "the model has no such weight"))
        elif own.shape != array.shape:
            problems.append(Problem(name, f"expected shape {list(own.shape)}, found {list(array.shape)}"))
        elif not (mx.issubdtype(own.dtype, mx.floating) and mx.issubdtype(array.dtype, mx.floating)):
            problems.append(Problem(name, f"expected plain floats, found {array.dtype} for {own.dtype}"))
    return problems


def _module_problems(network: nn.Module, path: str, module: Module, kind: str) -> list[Problem]:
    try:
        target = get_module(network, path)
    except KeyError:
        return [Problem(path, "the model has no such module")]
    target = base_of(target)
    if not can_carry(target, kind):
        return [Problem(path, f"is a {type(target).__name__}, which cannot carry {kind}")]
    shape, rank = weights.shape(target), module.rank
    expected: dict[str, tuple[int, ...]]
    if weights.is_experts(target):
        expected = {"lora_a": (shape[0], rank, shape[2]), "lora_b": (shape[0], shape[1], rank)}
    elif weights.is_embedding(target):
        expected = {"lora_a": (shape[0], rank), "lora_b": (rank, shape[1]), "m": (shape[0],)}
    else:
        expected = {"lora_a": (shape[1], rank), "lora_b": (rank, shape[0]), "m": (shape[0],)}
    return [
        Problem(f"{path}.{name}", f"expected shape {list(expected[name])}, found {list(array.shape)}")
        for name, array in module.arrays.items()
        if tuple(array.shape) != expected[name]
    ]
