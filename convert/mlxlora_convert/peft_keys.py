"""The keys of PEFT's state dict: which tensor of which module each of them names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlxlora.errors import Problem
from mlxlora_convert.peft_export import PREFIX

# the adapter's own name (`default`) stands in the keys of some files, between the tensor's name and `weight`
_KEY = re.compile(
    r"(?P<path>.+?)\.(?P<name>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.weight)?"
)
_SAVED = re.compile(r"(?P<path>.+?)(?:\.modules_to_save)?(?:\.default)?(?:\.base_layer)?\.(?P<name>weight|bias)")


@dataclass(slots=True)
class Lora:
    """The tensors of one LoRA in a file; `path` is the module's in transformers, `depth` the wrappers around it."""

    path: str
    depth: int
    tensors: dict[str, mx.array]
    keys: dict[str, str]

    def missing(self) -> list[Problem]:
        """Of its two factors those that the file lacks."""
        embedding = any(name.startswith("lora_embedding") for name in self.tensors)
        pair = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        return [
            Problem(next(iter(self.keys.values())), f"{name} of this module is missing from the file")
            for name in pair
            if name not in self.tensors
        ]


def sort(
    tensors: Mapping[str, mx.array], problems: list[Problem]
) -> tuple[list[Lora], dict[str, dict[str, tuple[str, mx.array]]]]:
    """The tensors by the module they belong to: LoRAs, and whole tensors of modules_to_save; others become problems."""
    loras: dict[str, Lora] = {}
    saved: dict[str, dict[str, tuple[str, mx.array]]] = defaultdict(dict)
    for key, tensor in sorted(tensors.items()):
        inner = key.removeprefix(PREFIX)
        if inner == key:
            problems.append(Problem(key, f"does not begin with '{PREFIX}', as every tensor of PEFT does"))
        elif not mx.issubdtype(tensor.dtype, mx.floating):
            problems.append(Problem(key, f"expected floating-point numbers, found {tensor.dtype}"))
        elif match := _KEY.fullmatch(inner):
            held = match["path"]
            path = held
            while path.endswith(".base_layer"):
                path = path.removesuffix(".base_layer")
            depth = held.count(".base_layer")
            lora = loras.setdefault(held, Lora(path, depth, {}, {}))
            lora.tensors[match["name"]] = tensor.astype(mx.float32)
            lora.keys[match["name"]] = key
        elif match := _SAVED.fullmatch(inner):
            saved[match["path"]][match["name"]] = (key, tensor)
        else:
            problems.append(Problem(key, "is no tensor of a LoRA adapter"))
    return list(loras.values()), saved
