"""An adapter out of PEFT's configuration and state dict, checked against the base. `peft_export.py` is the way back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from mlxlora.errors import AdapterError, Problem, UnsupportedError, nearest
from mlxlora_convert import peft_experts as stacks
from mlxlora_convert.lowrank import Kind, LowRank, Place
from mlxlora_convert.names import Experts, Names, each_expert
from mlxlora_convert.peft_config import PeftConfig
from mlxlora_convert.peft_export import PREFIX, tied_head
from mlxlora_convert.peft_keys import Lora, sort

BaseTensor = Callable[[str], "mx.array | None"]
"""A tensor of the base by name (`<module>.weight`, unpacked; `<module>.bias`), in MLX's layout, or None."""


@dataclass(slots=True)
class Imported:
    """An adapter by MLX module path, and what is to be said about it."""

    adapter: dict[str, LowRank]
    notes: list[str] = field(default_factory=list)


def from_peft(
    config: PeftConfig, tensors: Mapping[str, mx.array], names: Names, places: Mapping[str, Place], base: BaseTensor
) -> Imported:
    """A PEFT adapter as what it adds to each MLX module.

    Raises AdapterError, naming every tensor that is missing, unknown, misshapen or of a wrong dtype, with what was
    expected and what was found; UnsupportedError for what has no form here.
    """
    reader = _Reader(config, names, places, base)
    loras, saved = sort(tensors, reader.problems)
    for lora in loras:
        reader.add(lora)
    reader.gather_experts()
    reader.tied()
    for path, parts in saved.items():
        reader.add_saved(path, parts)
    reader.check_complete(loras)
    if reader.problems:
        raise AdapterError.of("This PEFT adapter does not fit the base model:", reader.problems)
    if not reader.found:
        raise AdapterError("This PEFT adapter holds no LoRA tensors.")
    return Imported(reader.found, reader.notes)


class _Reader:
    def __init__(self, config: PeftConfig, names: Names, places: Mapping[str, Place], base: BaseTensor) -> None:
        self.config, self.names, self.places, self.base = config, names, places, base
        self.found: dict[str, LowRank] = {}
        self.singles: dict[str, dict[int, LowRank]] = defaultdict(dict)
        self.heads: dict[str, LowRank] = {}
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    # ---- one LoRA -------------------------------------------------------------------------------------------------

    def add(self, lora: Lora) -> None:
        if missing := lora.missing():
            self.problems += missing
        elif (holder := self.names.expert_holder(lora.path)) is not None:
            self._add_stacked(lora, *holder)
        elif (single := self.names.single_expert(lora.path)) is not None:
            self._add_single(lora, *single)
        else:
            self._add_module(lora)

    def _factors(self, lora: Lora, kind: Kind, shape: tuple[int, ...], scale_path: str) -> LowRank | None:
        """A linear or embedding LoRA with its shapes checked against the base weight's [rows, columns]."""
        embedding = kind == "embedding"
        name_a, name_b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if name_a not in lora.tensors:
            here = "an embedding" if embedding else "a linear layer"
            self.problems.append(Problem(next(iter(lora.keys.values())), f"this module is {here} of the base"))
            return None
        rows, columns = shape
        rank = self.config.rank(scale_path)
        wide, tall = (rows, columns) if embedding else (columns, rows)
        good = self._shaped(lora, name_a, (rank, wide)) & self._shaped(lora, name_b, (tall, rank))
        if not good:
            return None
        a, b = lora.tensors[name_a], lora.tensors[name_b]
        return LowRank(kind, a.T, b.T, self.config.scale(scale_path))

    def _shaped(self, lora: Lora, name: str, expected: tuple[int, ...]) -> bool:
        found = tuple(lora.tensors[name].shape)
        if found != expected:
            self.problems.append(Problem(lora.keys[name], f"expected shape {list(expected)}, found {list(found)}"))
        return found == expected

    def _add_module(self, lora: Lora) -> None:
        path = next((path for path in self.names.to_mlx(lora.path) if path in self.places), None)
        if path is None and lora.path == self.names.family.head:
            self._add_tied_head(lora)
            return
        if path is None:
            known = [self.names.to_hf(path) for path in self.places]
            self.problems.append(
                Problem(
                    next(iter(lora.keys.values())),
                    f"the base has no module '{lora.path}' that can carry LoRA.{nearest(lora.path, known)}",
                )
            )
            return
        place = self.places[path]
        if self.config.dora and place.kind != "linear":
            raise UnsupportedError(
                f"{lora.path}: PEFT's DoRA scales the columns of an embedding, ours its rows. Merge the adapter with "
                "PEFT (merge_and_unload) and convert the merged model instead."
            )
        scale_path = f"{lora.path}.weight" if self._is_parameter(lora.path) else lora.path
        part = self._factors(lora, place.kind, place.shape, scale_path) if place.kind != "experts" else None
        if part is None:
            return
        self.found[path] = self._with_magnitude(lora, part, place) if place.kind == "linear" else part

    def _is_parameter(self, path: str) -> bool:
        full = f"{path}.weight"
        return any(full == name or full.endswith(f".{name}") for name in self.config.parameters)

    def _with_magnitude(self, lora: Lora, part: LowRank, place: Place) -> LowRank:
        magnitude = lora.tensors.get("lora_magnitude_vector")
        if (magnitude is not None) != self.config.dora:
            what = "DoRA is on, but this module has no lora_magnitude_vector" if magnitude is None else "DoRA is off"
            key = lora.keys.get("lora_magnitude_vector", lora.keys["lora_A"])
            self.problems.append(Problem(key, f"{what}; adapter_config.json says use_dora = {self.config.dora}"))
            return part
        if magnitude is None:
            return part
        rows = place.shape[0]
        if magnitude.size != rows:
            self.problems.append(
                Problem(lora.keys["lora_magnitude_vector"], f"expected shape [{rows}], found {list(magnitude.shape)}")
            )
            return part
        return LowRank(part.kind, part.a, part.b, part.scale, magnitude.reshape(rows))

    # ---- experts --------------------------------------------------------------------------------------------------

    def _add_stacked(self, lora: Lora, experts: Experts, holder: str) -> None:
        chosen = [
            name
            for name in ("gate_up_proj", "down_proj")
            if any(f"{lora.path}.{name}".endswith(f".{target}") or f"{lora.path}.{name}" == target
                   for target in self.config.parameters)
        ]  # fmt: skip
        if lora.depth >= len(chosen):
            self.problems.append(
                Problem(
                    next(iter(lora.keys.values())),
                    f"target_parameters of adapter_config.json name no parameter of '{lora.path}' for this tensor",
                )
            )
            return
        name = chosen[len(chosen) - 1 - lora.depth]  # the parameter declared first is the innermost
        gate, down = self.places.get(f"{holder}.gate_proj"), self.places.get(f"{holder}.down_proj")
        assert gate is not None and down is not None
        count, width, hidden = gate.shape
        out, in_ = (2 * width, hidden) if name == "gate_up_proj" else down.shape[1:]
        part = self._stack(lora, count, out, in_, f"{lora.path}.{name}")
        if part is None:
            return
        if name == "down_proj":
            self.found[f"{holder}.down_proj"] = part
        else:
            both = stacks.split(part, interleaved=experts.interleaved)
            self.found[f"{holder}.gate_proj"], self.found[f"{holder}.up_proj"] = both

    def _stack(self, lora: Lora, count: int, out: int, in_: int, path: str) -> LowRank | None:
        rank, scale = self.config.rank(path), self.config.scale(path)
        found = tuple(lora.tensors["lora_A"].shape), tuple(lora.tensors["lora_B"].shape)
        if found == ((rank * count, in_), (out, rank * count)):
            return stacks.unstacked(lora.tensors["lora_A"], lora.tensors["lora_B"], count, scale)
        if found == ((rank * count, out), (in_, rank * count)):
            return stacks.turned(stacks.unstacked(lora.tensors["lora_A"], lora.tensors["lora_B"], count, scale))
        self._shaped(lora, "lora_A", (rank * count, in_))
        self._shaped(lora, "lora_B", (out, rank * count))
        return None

    def _add_single(self, lora: Lora, path: str, number: int) -> None:
        place = self.places.get(path)
        if place is None or number >= place.shape[0]:
            count = place.shape[0] if place else 0
            self.problems.append(Problem(lora.keys["lora_A"], f"the base has {count} experts here"))
            return
        part = self._factors(lora, "linear", place.shape[1:], lora.path)
        if part is not None:
            self.singles[path][number] = part

    def gather_experts(self) -> None:
        for path, singles in self.singles.items():
            count = self.places[path].shape[0]
            self.found[path] = stacks.gathered([singles.get(number) for number in range(count)])
            if len(singles) < count:
                self.notes.append(f"{path}: {len(singles)} of {count} experts carry LoRA; the others get zeros.")

    # ---- tied embeddings ------------------------------------------------------------------------------------------

    def _add_tied_head(self, lora: Lora) -> None:
        embedding = next((path for path in self.places if tied_head(path, self.names, self.places)), None)
        if embedding is None:
            self.problems.append(Problem(lora.keys["lora_A"], "the base has no output projection to carry LoRA"))
            return
        part = self._factors(lora, "linear", self.places[embedding].shape, lora.path)
        if part is not None:
            self.heads[embedding] = part

    def tied(self) -> None:
        """A tied table is one module here and two in PEFT: both must carry the same update, or it cannot be said."""
        for path in [path for path in self.places if tied_head(path, self.names, self.places)]:
            table, head = self.found.get(path), self.heads.get(path)
            if table is None and head is None:
                continue
            if table is not None and head is None and self.config.raw.get("ensure_weight_tying"):
                continue
            if table is None or head is None or not _mirrored(table, head):
                carries = "both, differently" if table and head else f"the {'input' if table else 'output'} alone"
                raise UnsupportedError(
                    f"{path} of the base is input embedding and output projection in one. This adapter changes "
                    f"{carries}, which one table cannot. Merge it with PEFT (merge_and_unload after untying) instead."
                )

    # ---- modules_to_save ------------------------------------------------------------------------------------------

    def add_saved(self, hf_path: str, parts: dict[str, tuple[str, mx.array]]) -> None:
        """A module that was trained whole becomes an update of full rank; what equals the base is left out."""
        path = next((path for path in self.names.to_mlx(hf_path) if self.base(f"{path}.weight") is not None), None)
        for name, (key, tensor) in parts.items():
            old = self.base(f"{path}.{name}") if path else None
            if path is None or old is None:
                self.problems.append(Problem(key, f"the base has no '{hf_path}.{name}'"))
                continue
            new = tensor.astype(mx.float32)
            if self.names.family.conv1d and name == "weight" and self.places.get(path, _NONE).kind == "linear":
                new = new.T
            if new.shape != old.shape:
                resized = " (was the vocabulary resized?)" if "embed" in path or "head" in path else ""
                expected = f"expected shape {list(old.shape)}, found {list(new.shape)}{resized}"
                self.problems.append(Problem(key, expected))
            elif bool(mx.array_equal(new, old)):
                self.notes.append(f"{key} equals the base and is left out.")
            else:
                self._add_whole(path, key, new - old)

    def _add_whole(self, path: str, key: str, delta: mx.array) -> None:
        place = self.places.get(path, _NONE)
        plain = key.endswith(".weight") and place.kind in ("linear", "embedding") and place.shape
        if not plain or self.config.dora or path in self.found or tied_head(path, self.names, self.places):
            raise UnsupportedError(
                f"{key}: this module was trained whole (modules_to_save), which no low-rank layer here can hold"
                f"{'' if plain else ', since it is no matrix'}. Merge the adapter with PEFT (merge_and_unload) and "
                "convert the merged model instead."
            )
        rows, columns = place.shape
        if place.kind == "embedding":
            part = LowRank("embedding", delta, mx.eye(columns), 1.0)
        elif columns <= rows:
            part = LowRank("linear", mx.eye(columns), delta.T, 1.0)
        else:
            part = LowRank("linear", delta.T, mx.eye(rows), 1.0)
        self.found[path] = part
        self.notes.append(f"{key} was trained whole and becomes an update of full rank ({part.rank}).")

    # ---- completeness ---------------------------------------------------------------------------------------------

    def check_complete(self, loras: list[Lora]) -> None:
        """Every module that adapter_config.json names must have its tensors: a file cut short is no smaller adapter."""
        present = {lora.path for lora in loras}
        could: list[str] = []
        for path, place in self.places.items():
            expert = self.names.expert(path)
            if expert is None:
                could.append(self.names.to_hf(path))
            elif expert.experts.each and self.singles:
                could += [each_expert(expert, number) for number in range(place.shape[0])]
        carried = {mlx for path in present for mlx in (path, *self.names.to_mlx(path))}
        missing = [path for path in self.config.expected(could) if carried.isdisjoint((path, *self.names.to_mlx(path)))]
        self.problems += [
            Problem(f"{PREFIX}{path}.lora_A.weight", "adapter_config.json names this module, the file has no tensor")
            for path in missing
        ]


_NONE = Place("linear", ())


def _mirrored(table: LowRank, head: LowRank) -> bool:
    """Whether a linear update of the head is the update of the table, seen from the other side."""
    if table.rank != head.rank or table.scale != head.scale:
        return False
    return bool(mx.array_equal(table.a.T, head.b)) and bool(mx.array_equal(table.b.T, head.a))
