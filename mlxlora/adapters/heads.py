"""The `kv_b_proj` of multi-head latent attention (MLA), which mlx-lm keeps as two layers, as the one layer that it is.

    R  width of the latent    H  heads    N  width of a head's keys (without rotation)    V  width of its values

    kv_b_proj    [H·(N+V), R]   for each head the rows of its keys, then those of its values
    embed_q      [H, R, N]      its keys, turned: multiplied with the latent it gives keys; transposed, with queries
    unembed_out  [H, V, R]      its values

Everybody else knows the one matrix (transformers, PEFT, llama.cpp), and its LoRA is one pair of factors, of which A is
shared by all heads, keys and values. So it is one module here, too, at the path that it has there: `Heads` stands for
it wherever a module is asked for by path, and `Whole` is what an adapter around it derives from. The network has no
place for it; what stands in the two places is a `Half`, which leaves the computation to the whole.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import weights
from mlxlora.adapters.layer import Wrapper
from mlxlora.adapters.weights import JOINED, KEYS, VALUES, Heads

Role = Literal["keys", "queries", "values"]
"""What a half is asked for: keys or values of the latent, or queries taken into the space of the latent."""


class Whole(Wrapper):
    """Something around a `Heads`: it stands in the attention module beside its two halves, and holds no layer of it."""

    _heads: Heads

    def hold(self, layer: nn.Module) -> None:
        object.__setattr__(self, "_heads", layer)  # its arrays are those of the halves, and no parameters here

    @property
    def base(self) -> Heads:
        """The two layers, as one."""
        return self._heads

    @abstractmethod
    def call(self, role: Role, base: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """The output of one half for `x`; `base` is what that half does without an adapter."""

    def fuse(self, *, dequantize: bool = False, dtype: mx.Dtype | None = None) -> nn.Module:
        halves = (Half(self, name).fuse(dequantize=dequantize, dtype=dtype) for name in (KEYS, VALUES))
        return Heads(*halves)


class Half(Wrapper):
    """What stands in one of the two places while there is something around the whole."""

    _whole: Whole

    def __init__(self, whole: Whole, name: str) -> None:
        super().__init__(whole.base.halves[name])
        object.__setattr__(self, "_whole", whole)  # it stands beside this one: its arrays are no parameters here
        self.name = name

    def adapted(self) -> mx.array:
        return self._whole.base.apart(self._whole.adapted())[self.name]

    def changes(self) -> bool:
        return self._whole.changes()

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        role: Role = "values" if self.name == VALUES else "queries" if transpose else "keys"
        return self._whole.call(role, lambda x: self.linear(x, transpose), x)

    linear: Any


def part(whole: mx.array, heads: Heads, role: Role) -> mx.array:
    """Of something [..., H·(N+V)] the part of the keys (which queries use, too) or of the values: [H, ..., N or V]."""
    count, keys, _ = heads.sizes
    each = mx.moveaxis(whole.reshape(*whole.shape[:-1], count, -1), -2, 0)
    return each[..., keys:] if role == "values" else each[..., :keys]


def find(modules: Mapping[str, nn.Module]) -> dict[str, Heads]:
    """By the path that its `kv_b_proj` has elsewhere: every attention module among these that is made so."""
    found = {f"{path}.{JOINED}": of(module) for path, module in modules.items()}
    return {path: heads for path, heads in found.items() if heads is not None}


def of(attention: Any) -> Heads | None:
    """The split projection of an attention module; None where it has none."""
    if not isinstance(attention, nn.Module) or JOINED in attention:
        return None
    keys, values = attention.get(KEYS), attention.get(VALUES)
    if keys is None or values is None or not weights.is_half(keys) or not weights.is_half(values):
        return None
    return Heads(keys, values)


def in_place(network: nn.Module) -> dict[str, Wrapper]:
    """Whatever stands around a layer of the network, by the path of that layer: of a `kv_b_proj` its halves."""
    found = ((path, module) for path, module in network.named_modules() if isinstance(module, Wrapper))
    return {path: module for path, module in found if not isinstance(module, Whole)}


def put(attention: Any, module: Heads | Whole) -> None:
    """Put the two layers in their places, or something around them."""
    if isinstance(module, Whole):
        attention[JOINED] = module
        attention |= {name: Half(module, name) for name in (KEYS, VALUES)}
    else:
        attention.pop(JOINED, None)
        attention |= module.halves
