"""Several adapters on one loaded model, each with a name and a scale that can change between two calls.

    y = base(x) + Σ sᵢ · (adapterᵢ(x) − base(x))

which for LoRA is base(x) + Σ sᵢ · scaleᵢ · Bᵢ Aᵢ x, and for an adapter of type full the same sum over its weights.
A scale of 0 is off and costs nothing; 1 is the adapter as it was trained; negative scales take it away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import weights
from mlxlora.adapters.config import LayerConfig
from mlxlora.adapters.dora import DoRA
from mlxlora.adapters.files import Adapter, check_scale, parse_spec, read_adapter
from mlxlora.adapters.heads import Role, Whole
from mlxlora.adapters.inject import get_module, injected, set_module
from mlxlora.adapters.kinds import layer_type
from mlxlora.adapters.layer import AdapterLayer, Wrapper, base_of
from mlxlora.adapters.lora import with_weight
from mlxlora.adapters.state import check_fits
from mlxlora.errors import AdapterError, ConfigError, UnsupportedError, nearest


@dataclass(eq=False)
class LiveAdapter:
    """One adapter on a model. Change its strength with `scale`; see `Adapters`."""

    name: str
    adapter: Adapter
    path: Path | None
    _scale: float
    _changed: Callable[[LiveAdapter], None] = field(repr=False)

    @property
    def scale(self) -> float:
        """Its strength: 0 is off, 1 as it was trained."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        check_scale(value, self.name)
        self._scale = float(value)
        self._changed(self)

    def __str__(self) -> str:
        ranks = "/".join(map(str, self.adapter.ranks))
        rank = f" of rank {ranks}" if ranks else ""
        return f"{self.name}: {self.adapter.type}{rank}, {len(self.adapter.paths)} modules, scale {self.scale:g}"


class LiveLayer(Wrapper):
    """A layer with any number of adapters beside it, each with a scale of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        object.__setattr__(self, "parts", [])  # plain list: what adapters hold are no parameters of the model

    parts: list[tuple[LiveAdapter, AdapterLayer, tuple[Any, ...]]]

    def added(self, base: mx.array, effect: Callable[[Any, tuple[Any, ...]], mx.array]) -> mx.array:
        """`base` and, times its scale, the effect of every adapter that is not off.

        effect: of an adapted layer and of what is kept for it, to be passed on to its `effect`
        """
        total = base
        for owner, layer, kept in self.parts:
            if owner.scale:
                total = total + owner.scale * effect(layer, kept)
        return total

    def adapted(self) -> mx.array:
        base = weights.dense(self.base)
        return self.added(base, lambda layer, kept: layer.adapted() - base)

    def changes(self) -> bool:
        return any(owner.scale and layer.changes() for owner, layer, _ in self.parts)

    def _extra_repr(self) -> str:
        return ", ".join(f"{owner.name}={owner.scale:g}" for owner, _, _ in self.parts)


class LiveLinear(LiveLayer):
    """Adapters on a linear layer."""

    def __call__(self, x: mx.array) -> mx.array:
        base: mx.array = self.base(x)
        return self.added(base, lambda layer, kept: layer.effect(x, base, *kept))


class LiveSwitchLinear(LiveLayer):
    """Adapters on the stacked experts of a mixture."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        base: mx.array = self.base(x, indices, sorted_indices=sorted_indices)
        return self.added(base, lambda layer, kept: layer.effect(x, base, indices, sorted_indices))


class LiveHeads(LiveLayer, Whole):
    """Adapters on the split projection of multi-head latent attention."""

    def call(self, role: Role, base: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        y = base(x)
        return self.added(y, lambda layer, kept: layer.effect(x, y, role, base, *kept))


class LiveRouter(LiveLayer):
    """Adapters on a router of experts that holds its matrix itself."""

    def __call__(self, x: mx.array) -> Any:
        if not any(owner.scale for owner, _, _ in self.parts):
            return self.base(x)
        return with_weight(self.base, self.adapted(), x)


class LiveEmbedding(LiveLayer):
    """Adapters on a table of embeddings and on the head that may be tied to it."""

    base_name = "embedding"

    def __call__(self, tokens: mx.array) -> mx.array:
        base: mx.array = self.base(tokens)
        return self.added(base, lambda layer, kept: layer.effect(tokens, base, *kept))

    def as_linear(self, x: mx.array) -> mx.array:
        """The tied head: scores for every token."""
        base: mx.array = self.base.as_linear(x)
        return self.added(base, lambda layer, kept: layer.effect_as_linear(x, base, *kept))


class Adapters:
    """The adapters on one network, by name: add, list, change scales, remove.

        model.adapters.add("RUN", name="style")
        model.adapters["style"].scale = 0.5
        model.adapters.remove("style")

    Iterating gives `LiveAdapter` objects in the order in which they were added. When the last one that changes a
    module is removed, the module itself stands in its place again.
    """

    def __init__(self, network: nn.Module, base: Callable[[], str | None] = lambda: None) -> None:
        self._network = network
        self._base = base
        self._by_name: dict[str, LiveAdapter] = {}
        self._originals: dict[str, mx.array] = {}  # of the weights that adapters of type full change

    def add(
        self,
        adapter: Adapter | str | Path,
        *,
        name: str | None = None,
        scale: float = 1.0,
        any_base: bool = False,
    ) -> LiveAdapter:
        """Put an adapter, or the one in a directory or run, on the model.

        name:     how it will be called; when left out, after its directory
        any_base: take it even when it was made for another model, as long as all shapes fit
        Raises AdapterError when it is damaged, does not fit the model, or when the name is taken.
        """
        path = None if isinstance(adapter, Adapter) else Path(adapter)
        check_scale(scale, str(path or name))
        if injected(self._network) is not None:
            raise ConfigError("The model carries an adapter that trains. Remove it first.")
        if name is not None and name in self._by_name:
            raise AdapterError(f"There is an adapter called '{name}' already. Give this one another name.")
        read = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
        check_fits(self._network, read, base=None if any_base else self._base())
        kinds = {one.adapter.type for one in self} | {read.type}
        if {"full", "dora"} <= kinds:
            raise UnsupportedError("An adapter of type full and one of type dora cannot be on one model together.")
        live = LiveAdapter(name or self._free_name(path), read, path, float(scale), self._changed)
        if read.type == "full":
            for weight in read.weights:
                self._originals.setdefault(weight, self._weight(weight))
        else:
            for place in read.paths:
                self._put(place, live)
        self._by_name[live.name] = live
        self._changed(live)
        return live

    def add_spec(self, spec: str, *, any_base: bool = False) -> LiveAdapter:
        """`add` for `PATH` or `PATH=SCALE`, as given on the command line."""
        path, scale = parse_spec(spec)
        return self.add(path, scale=scale, any_base=any_base)

    def remove(self, name: str) -> None:
        """Take one adapter off the model."""
        live = self[name]
        del self._by_name[name]
        if live.adapter.type == "full":
            self._changed(live)
            kept = {weight for one in self for weight in one.adapter.weights}
            for weight in self._originals.keys() - kept:
                del self._originals[weight]
            return
        for place in live.adapter.paths:
            slot = get_module(self._network, place)
            assert isinstance(slot, LiveLayer)
            slot.parts[:] = [part for part in slot.parts if part[0] is not live]
            if not slot.parts:
                set_module(self._network, place, slot.base)

    def clear(self) -> None:
        """Take all adapters off the model."""
        for name in list(self._by_name):
            self.remove(name)

    def set_scales(self, scales: dict[str, float]) -> None:
        """Change several scales; those not named stay."""
        for name in scales:
            self[name]  # refuse before anything changes
        for name, scale in scales.items():
            self[name].scale = scale

    @property
    def scales(self) -> dict[str, float]:
        """Name → scale."""
        return {live.name: live.scale for live in self}

    def __getitem__(self, name: str) -> LiveAdapter:
        try:
            return self._by_name[name]
        except KeyError:
            known = list(self._by_name)
            there = f"There are: {', '.join(known)}." if known else "There are none."
            raise AdapterError(f"No adapter is called '{name}'.{nearest(name, known)} {there}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[LiveAdapter]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def __str__(self) -> str:
        return "\n".join(str(live) for live in self) or "no adapters"

    def _free_name(self, path: Path | None) -> str:
        base = "adapter"
        if path is not None:
            resolved = path.resolve()
            base = resolved.parent.name if resolved.name in ("adapter", "best") else resolved.name
        name, number = base, 2
        while name in self._by_name:
            name, number = f"{base}-{number}", number + 1
        return name

    def _put(self, place: str, live: LiveAdapter) -> None:
        """Add one module of an adapter to its place in the network."""
        slot = get_module(self._network, place)
        if not isinstance(slot, LiveLayer):
            slot = _live_kind(slot)(slot)
            set_module(self._network, place, slot)
        module = live.adapter.modules[place]
        layer = layer_type(live.adapter.type, slot.base)(slot.base, LayerConfig(module.rank, module.scale))
        for name, array in module.arrays.items():
            layer[name] = array
        kept = (layer.magnitude(),) if isinstance(layer, DoRA) else ()
        mx.eval(module.arrays, kept)
        slot.parts.append((live, layer, kept))

    def _weight(self, path: str) -> mx.array:
        place, _, leaf = path.rpartition(".")
        array: mx.array = base_of(get_module(self._network, place))[leaf]
        return array

    def _changed(self, live: LiveAdapter) -> None:
        """Bring the weights that adapters of type full change in line with the scales."""
        if live.adapter.type != "full":
            return
        for path in live.adapter.weights:
            original = self._originals[path]
            total = original.astype(mx.float32)
            on = [one for one in self if one.scale and path in one.adapter.weights]
            for one in on:
                total = total + one.scale * (one.adapter.weights[path].astype(mx.float32) - original)
            place, _, leaf = path.rpartition(".")
            base_of(get_module(self._network, place))[leaf] = total.astype(original.dtype) if on else original


def _live_kind(layer: nn.Module) -> type[LiveLayer]:
    if weights.is_experts(layer):
        return LiveSwitchLinear
    if weights.is_heads(layer):
        return LiveHeads
    if weights.is_bare_router(layer):
        return LiveRouter
    return LiveEmbedding if weights.is_embedding(layer) else LiveLinear


def attach(network: nn.Module, specs: Sequence[str], *, base: str | None = None) -> Adapters:
    """Put adapters (`PATH` or `PATH=SCALE` each) on a network and return their registry.

    base: the fingerprint of the model, compared with that in each adapter's manifest
    """
    adapters = Adapters(network, lambda: base)
    for spec in specs:
        adapters.add_spec(spec)
    return adapters
