"""What all adapted layers share: a base layer, a few learned arrays beside it, and the way back."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import weights
from mlxlora.adapters.config import LayerConfig
from mlxlora.errors import UnsupportedError

FORWARDED = frozenset({"bias", "biases", "scales", "global_scale", "group_size", "bits", "mode", "num_experts"})


class Wrapper(nn.Module):
    """Something around a layer of the model. The layer is the very object that stood there, and is never written to."""

    base_name: ClassVar[str] = "linear"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.hold(layer)
        self.train(layer.training)

    def hold(self, layer: nn.Module) -> None:
        """Keep the layer inside, where the parameters of the model are looked for."""
        self[self.base_name] = layer

    @property
    def base(self) -> nn.Module:
        """The layer inside."""
        layer: nn.Module = self[self.base_name]
        return layer

    @abstractmethod
    def adapted(self) -> mx.array:
        """The weight that one plain layer would need to do the same: float32, unpacked."""

    @abstractmethod
    def changes(self) -> bool:
        """Whether there is any effect (a fresh adapter, and one of scale 0, have none)."""

    @property
    def input_dims(self) -> int:
        """Width of the input (for an embedding: number of tokens)."""
        shape = weights.shape(self.base)
        return shape[0] if weights.is_embedding(self.base) else shape[-1]

    @property
    def output_dims(self) -> int:
        """Width of the output."""
        shape = weights.shape(self.base)
        return shape[-1] if weights.is_embedding(self.base) else shape[-2]

    def fuse(self, *, dequantize: bool = False, dtype: mx.Dtype | None = None) -> nn.Module:
        """One plain layer that computes what base and adapter do together.

        It keeps bias, dtype and quantization of the base (`dequantize` unpacks it; `dtype` is then the dtype of the
        result, which not every quantization tells). The base itself comes back where nothing changes, so that not a
        byte of it moves.
        """
        packed = weights.quantization(self.base)
        if not self.changes():
            unpack = packed is not None and dequantize
            return weights.like(self.base, weights.dense(self.base), None, dtype) if unpack else self.base
        return weights.like(self.base, self.adapted(), None if dequantize else packed, dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise UnsupportedError(
                f"The model assigns the weight of a {type(self.base).__name__} while it computes. "
                "Such a layer cannot carry an adapter: leave it out of the targets."
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Some models read the weight of a layer themselves: they get the adapted one, and the packing as it is."""
        if name == "weight":
            base = self.base
            return base["weight"] if weights.quantization(base) else self.adapted().astype(base["weight"].dtype)
        if name in FORWARDED:
            return getattr(self.base, name)
        return super().__getattr__(name)


class AdapterLayer(Wrapper):
    """A layer of the model with something learned beside it.

    Adapter arrays are float32; the forward pass runs in the dtype of the input.

    Attributes:
        rank:    rank of the factors
        scale:   what their product is multiplied with
        dropout: probability of zeroing an input of the adapter; it acts only while a dropout key is set
    """

    learned: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")
    rank: int
    scale: float
    dropout: float
    _dropout_key: mx.array | None

    def __init__(self, layer: nn.Module, config: LayerConfig) -> None:
        super().__init__(layer)
        self.rank, self.scale, self.dropout = config.rank, config.scale, config.dropout
        self.set_dropout_key(None)

    @classmethod
    def wrap(cls, layer: nn.Module, config: LayerConfig, key: mx.array | None = None) -> Self:
        """Put an adapter that changes nothing yet around `layer`; `key` is the randomness of its start.

        `layer` itself stays as it is and comes free again as `.base`.
        """
        wrapped = cls(layer, config)
        wrapped.start(mx.random.key(0) if key is None else key)
        return wrapped

    @abstractmethod
    def start(self, key: mx.array) -> None:
        """Make the learned arrays such that the layer computes what its base does."""

    def set_dropout_key(self, key: mx.array | None) -> None:
        """The randomness of the next forward passes; None switches dropout off."""
        object.__setattr__(self, "_dropout_key", key)  # no entry of the module's dict: it is state of no one

    def drop(self, x: mx.array) -> mx.array:
        """`x` with some entries zeroed and the others scaled up; `x` itself when no dropout key is set."""
        if self._dropout_key is None or self.dropout == 0:
            return x
        keep = mx.random.bernoulli(1 - self.dropout, x.shape, self._dropout_key)
        return mx.where(keep, x * (1 / (1 - self.dropout)), mx.zeros((), x.dtype))

    def _extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def base_of(module: nn.Module) -> nn.Module:
    """The layer inside of whatever stands around it."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def kaiming(key: mx.array, shape: tuple[int, ...], width: int) -> mx.array:
    """Uniform in ±1/√width: how PEFT and mlx-lm start the first factor."""
    bound = 1 / width**0.5
    return mx.random.uniform(-bound, bound, shape, mx.float32, key)


def adapter_layers(module: nn.Module) -> list[tuple[str, AdapterLayer]]:
    """Every adapted layer below `module` (or `module` itself, with the path ''), ordered by path."""
    found = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, AdapterLayer)]
    return sorted(found, key=lambda item: item[0])


def set_dropout_keys(module: nn.Module, key: mx.array | None) -> None:
    """Give every adapted layer below `module` its own part of `key`, in path order; None switches dropout off.

    Deterministic: the same key means the same masks, so a recomputed block sees what the first pass saw.
    """
    layers = [layer for _, layer in adapter_layers(module) if layer.dropout > 0]
    if key is None or not layers:
        for layer in layers:
            layer.set_dropout_key(None)
        return
    for layer, part in zip(layers, mx.random.split(key, len(layers)), strict=True):
        layer.set_dropout_key(part)
