"""Put adapters into a network, and take them out again so that the network is as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import full, heads, weights
from mlxlora.adapters.config import AdapterConfig
from mlxlora.adapters.kinds import layer_type
from mlxlora.adapters.layer import AdapterLayer, Wrapper
from mlxlora.adapters.select import select
from mlxlora.errors import ConfigError, UnsupportedError
from mlxlora.parameters import flat


@dataclass(frozen=True, slots=True)
class Injection:
    """What was put into a network, and what it takes to undo it.

    Attributes:
        config:    the settings
        paths:     paths of the adapted modules, ordered
        left_out:  modules that a preset meant but that cannot carry this adapter, with the reason
        trainable: number of weights that train
        total:     number of weights of the network, each packed one counted
    """

    config: AdapterConfig
    paths: tuple[str, ...]
    left_out: dict[str, str]
    trainable: int
    total: int
    frozen_before: tuple[tuple[nn.Module, frozenset[str]], ...] = field(repr=False, compare=False, default=())
    opened: tuple[full.Opened, ...] = field(repr=False, compare=False, default=())


def inject(network: nn.Module, config: AdapterConfig, *, seed: int = 0) -> Injection:
    """Freeze `network`, adapt the modules that `config` means, and leave only these (their adapters) trainable.

    Adapters start without effect. Their random start depends on `seed` and on the path of the module alone.
    Raises ConfigError when the network carries adapters already or when a target means nothing in it.
    """
    refuse_injected(network)
    selection = select(network, config)
    refuse_shared(selection.chosen)
    before = tuple((module, frozenset(module._no_grad)) for _, module in network.named_modules())
    total = count_weights(network)
    opened: list[full.Opened] = []
    try:
        if config.type == "full":
            arrays = {path: full.trainable_arrays(module) for path, module in selection.chosen.items()}
            network.freeze()
            for path, own in arrays.items():
                if own:
                    opened.append(full.open_module(path, selection.chosen[path], own))
        else:
            network.freeze()
            for path, module in selection.chosen.items():
                layer = layer_type(config.type, module).wrap(module, config.layer(path), start_key(seed, path))
                layer.unfreeze(recurse=False, keys=list(layer.learned))
                set_module(network, path, layer)
    except BaseException:
        _restore(network, before, opened)
        raise
    paths = tuple(o.path for o in opened) if config.type == "full" else tuple(selection.chosen)
    trainable = sum(array.size for array in flat(network.trainable_parameters()).values())
    injection = Injection(config, paths, selection.left_out, trainable, total, before, tuple(opened))
    object.__setattr__(network, "_injection", injection)
    return injection


def injected(network: nn.Module) -> Injection | None:
    """What `inject` put into this network, or None."""
    return vars(network).get("_injection")


def kept_aside(network: nn.Module) -> int:
    """Bytes of weights that full fine-tuning keeps to put back, and that so far are the very arrays that train."""
    injection = injected(network)
    opened = injection.opened if injection else ()
    return sum(
        array.nbytes for one in opened for name, array in one.originals.items() if dict.get(one.module, name) is array
    )


def remove(network: nn.Module) -> None:
    """Take all adapters out: the same modules with the same arrays stand in their places, trainable as before."""
    injection = injected(network)
    _restore(network, injection.frozen_before if injection else (), injection.opened if injection else ())
    if injection:
        object.__delattr__(network, "_injection")


def _restore(
    network: nn.Module,
    frozen: Sequence[tuple[nn.Module, frozenset[str]]],
    opened: Sequence[full.Opened],
) -> None:
    for path, module in network.named_modules():
        if isinstance(module, AdapterLayer):
            set_module(network, path, module.base)
    for one in opened:
        full.close_module(one)
    for module, names in frozen:
        module._no_grad = set(names)


def start_key(seed: int, path: str) -> mx.array:
    """The randomness for the start of the module at `path`: it does not depend on which other modules are adapted."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "big"))


def refuse_injected(network: nn.Module) -> None:
    """Raise ConfigError when the network carries adapters."""
    carrying = next((path for path, m in network.named_modules() if isinstance(m, Wrapper)), None)
    if injected(network) is not None or carrying is not None:
        raise ConfigError(f"The model carries adapters already ({carrying or 'full'}). Remove them first.")


def refuse_shared(chosen: dict[str, nn.Module]) -> None:
    """Raise UnsupportedError when one module object stands in two places: its adapters would fight."""
    first: dict[int, str] = {}
    for path, module in chosen.items():
        if id(module) in first:
            raise UnsupportedError(
                f"{path} and {first[id(module)]} are one and the same module; adapt neither of them."
            )
        first[id(module)] = path


def get_module(network: nn.Module, path: str) -> nn.Module:
    """The module at `path` (MLA's `kv_b_proj` is one, see `heads.py`). Raises KeyError when there is none."""
    place: Any = network
    for part in path.split(".") if path else []:
        try:
            split = heads.of(place) if part == weights.JOINED else None
            if split is not None:
                place = split
            else:
                place = place[int(part)] if isinstance(place, (list, tuple)) else place[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise KeyError(path) from None
    if not isinstance(place, nn.Module):
        raise KeyError(path)
    return place


def set_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where another stands."""
    parent, _, name = path.rpartition(".")
    place: Any = network
    for part in parent.split(".") if parent else []:
        place = place[int(part)] if isinstance(place, (list, tuple)) else place[part]
    if isinstance(module, (weights.Heads, heads.Whole)):
        heads.put(place, module)
        return
    place[int(name) if isinstance(place, (list, tuple)) else name] = module


def count_weights(network: nn.Module) -> int:
    """The number of weights of a network; of packed ones, what they unpack to."""
    total = 0
    for _, module in network.named_modules():
        arrays = {k: v for k, v in module.items() if isinstance(v, mx.array) and not k.startswith("_")}
        if "scales" in arrays and weights.quantization(module):
            size = 1
            for width in weights.shape(module):
                size *= width
            total += size + (arrays["bias"].size if "bias" in arrays else 0)
        else:
            total += sum(array.size for array in arrays.values())
    return total
