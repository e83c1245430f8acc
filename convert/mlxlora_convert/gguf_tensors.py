"""Tensors on their way to and from GGUF: what each becomes, and how rows are encoded in GGUF's number formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxlora.errors import ModelError, Problem
from mlxlora_convert.gguf_architectures import Change, Family, Tensors
from mlxlora_convert.gguf_options import GGUFType
from mlxlora_convert.safetensors_rows import Floats
from mlxlora_convert.weight_rows import (
    Blocks,
    PermutedRows,
    PermutedVector,
    QuantizedWeight,
    Reshaped,
    Scaled,
    Stacked,
    Weight,
)

SMALL = (
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "mxfp4",
)  # too coarse for the head, which gets q8_0
BLOCK = 32
# value = d · (code - offset) [+ m]: the codes of each integer type, and whether a minimum is stored
CODED: dict[str, tuple[int, int | None]] = {
    "q8_0": (8, 128), "q4_0": (4, 8), "q5_0": (5, 16), "q4_1": (4, None), "q5_1": (5, None)
}  # fmt: skip
CHUNK = 1 << 20  # values that are in memory at a time, as float32: 4 MiB


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor to write: its name and type in GGUF, and where its rows come from."""

    name: str
    weight: Weight
    type: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost dimension first; a vector has one."""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        block, size = block_size(self.type)
        return self.weight.rows * self.shape[-1] // block * size


def ggml_type(name: str) -> Any:
    """The gguf package's type for one of ours."""
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType[name.upper()]


def block_size(name: str) -> tuple[int, int]:
    """(values, bytes) of a block of this type."""
    from gguf.constants import GGML_QUANT_SIZES

    values, size = GGML_QUANT_SIZES[ggml_type(name)]
    return int(values), int(size)


def plan(
    family: Family, weights: dict[str, Weight], config: dict[str, Any], kind: GGUFType
) -> tuple[list[Planned], list[str]]:
    """What is written for every weight, and notes on tensors that get another type than asked for.

    Raises ModelError naming tensors that the family's table does not know or that are missing.
    """
    planned: list[Planned] = []
    used: set[str] = set()
    missing: list[str] = []
    for entry, name in each_module(family, int(config["num_hidden_layers"])):
        source = entry.mlx.format(i=name)
        target = entry.gguf.format(i=name)
        found = pieces(entry, source, weights)
        used |= {piece for _, names in found for piece in names}
        if not found and not entry.optional:
            missing.append(f"{source}.weight")
        for part, names in found:
            weight = changed(entry, [weights[piece] for piece in names], config, backwards=False)
            planned.append(Planned(f"{target}.{part}", weight, type_of(f"{target}.{part}", weight, entry, kind)))
    unknown = [name for name in weights if name not in used]
    problems = [Problem(name, "missing") for name in missing]
    problems += [Problem(name, f"has no place in GGUF's {family.gguf}", advice_for(name)) for name in unknown]
    if problems:
        raise ModelError.of(f"The weights do not fit a {family.model_type} model:", problems)
    odd = [one.name for one in planned if kind not in ("f32", "f16", "bf16") and one.type == "f16"]
    notes = [f"Kept as f16, because their rows are no multiple of {BLOCK}: {', '.join(odd)}."] if odd else []
    return planned, notes


def each_module(family: Family, layers: int) -> Iterator[tuple[Tensors, int]]:
    """Every module of a family with the number of its block (0 for those outside of the blocks), blocks in order."""
    inside = [entry for entry in family.tensors if "{i}" in entry.gguf]
    for entry in family.tensors:
        if "{i}" not in entry.gguf:
            yield entry, 0
    for layer in range(layers):
        for entry in inside:
            yield entry, layer


def pieces(entry: Tensors, module: str, weights: dict[str, Weight]) -> list[tuple[str, list[str]]]:
    """The weight and the bias of a module as far as they are there: [(part, names of the tensors it is made of)]."""
    if entry.change == "per_head":
        names: list[str] = []
        while (name := f"{module}.norms.{len(names)}.weight") in weights:
            names.append(name)
        return [("weight", names)] if names else []
    parts = ((part, f"{module}.{part}") for part in ("weight", "bias"))
    return [(part, [name]) for part, name in parts if name in weights]


def advice_for(name: str) -> str:
    """What to do about a tensor that the table does not know."""
    if ".experts." in name:
        return "The experts are not stacked: this is a Hugging Face directory; run mlxlora convert on it first"
    return "Give a model directory made by mlxlora convert or mlxlora fuse"


def type_of(name: str, weight: Weight, entry: Tensors, kind: str) -> str:
    """The type a tensor gets: vectors, norms and routers float32; a head or embedding not below 8 bits."""
    if len(weight.shape) < 2 or entry.keep or "norm" in name or name.endswith(".bias"):
        return "f32"
    if kind in ("f32", "f16", "bf16"):
        return kind
    if weight.shape[-1] % BLOCK:
        return "f16"
    if kind in SMALL and name in ("token_embd.weight", "output.weight") and not same_quantization(weight, kind):
        return "q8_0"
    return kind


def same_quantization(weight: Weight, kind: str) -> bool:
    """Whether MLX stores the weight in a quantization that GGUF's `kind` is the same as."""
    inner = weight.inner if isinstance(weight, PermutedRows) else weight
    if not isinstance(inner, QuantizedWeight) or inner.group % BLOCK:
        return False
    if kind == "mxfp4":
        return inner.mode == "mxfp4"
    bits = CODED[kind][0] if kind in CODED else 0
    return inner.mode == "affine" and inner.bits == bits


def changed(entry: Tensors, found: list[Weight], config: dict[str, Any], *, backwards: bool) -> Weight:
    """The weight as the other side stores it: `backwards` from GGUF, else to GGUF."""
    weight = found[0]
    change: Change = entry.change
    if change == "rotary" and not config.get("rope_traditional"):
        heads = config["num_key_value_heads"] if entry.gguf.endswith("attn_k") else config["num_attention_heads"]
        rows = weight_rows(weight)
        if backwards and rows != heads * config["head_dim"]:
            return weight  # left for whoever holds its shape against the network's
        order = rotary_order(rows // heads, backwards=backwards)
        return PermutedVector(weight, order) if len(weight.shape) == 1 else PermutedRows(weight, order)
    if change == "plus_one":
        return Scaled(weight, shift=-1.0 if backwards else 1.0)
    if change in ("query_scale", "query_scale_norm"):
        factor = 1.0 if backwards else query_factor(config)
        shift = {"query_scale": 0.0}.get(change, -1.0 if backwards else 1.0)
        return weight if factor == 1.0 and shift == 0.0 else Scaled(weight, factor=factor, shift=shift)
    if change == "one_row":
        return Reshaped(weight, (1, weight.shape[-1]) if backwards else (weight.shape[-1],))
    if change == "per_head":
        return weight if backwards else Stacked(found)
    return weight


def weight_rows(weight: Weight) -> int:
    """Output features: the rows of a matrix, the length of a vector."""
    return weight.shape[0]


def rotary_order(head: int, *, backwards: bool) -> NDArray[np.intp]:
    """For each row of a head, the row it comes from: halves become neighbours, or back."""
    to_neighbours = np.arange(head, dtype=np.intp).reshape(2, head // 2).T.ravel()
    return np.argsort(to_neighbours) if backwards else to_neighbours


def query_factor(config: dict[str, Any]) -> float:
    """What the query must be multiplied by, because llama.cpp fixes the attention scale of Gemma 2 and 3.

    It takes 1/√head_dim, except for the sizes that it knows as 27B (46 and 62 blocks): 1/√(hidden / heads).
    """
    return float((assumed_scalar(config) / config["query_pre_attn_scalar"]) ** 0.5)


def assumed_scalar(config: dict[str, Any]) -> float:
    """The `query_pre_attn_scalar` that llama.cpp assumes."""
    large = {"gemma2": 46, "gemma3_text": 62}[config["model_type"]]
    if config["num_hidden_layers"] == large:
        return float(config["hidden_size"]) / float(config["num_attention_heads"])
    return float(config["head_dim"])


def encoded(one: Planned) -> Iterator[tuple[bytes, bool]]:
    """The tensor's bytes, a chunk of rows at a time, each with whether MLX's own quantization could be kept.

    Raises ModelError for values that are not finite, or too large for the type.
    """
    step = max(1, CHUNK // one.shape[-1])
    for start in range(0, one.weight.rows, step):
        stop = min(start + step, one.weight.rows)
        kept = (
            keep_blocks(one.weight.blocks(start, stop), one.type) if one.type in CODED or one.type == "mxfp4" else None
        )
        if kept is not None:
            yield kept.tobytes(), True
            continue
        values = one.weight.floats(start, stop)
        if not np.isfinite(values).all():
            raise ModelError.of(
                "A weight is not a finite number:", [Problem(one.name, f"in rows {start} to {stop - 1}")]
            )
        yield encode(values, one.type, one.name).tobytes(), False


def encode(values: Floats, kind: str, name: str) -> NDArray[Any]:
    """Float32 rows in the number format `kind`, as the gguf package rounds them."""
    if kind == "f32":
        return values
    if kind == "f16":
        largest = float(np.abs(values).max(initial=0.0))
        if largest > 65504:
            raise ModelError.of(
                "A weight is too large for float16:", [Problem(name, f"{largest:g}", "Export as bf16 or f32")]
            )
        return values.astype(np.float16)
    from gguf.quants import quantize

    result: NDArray[Any] = quantize(np.ascontiguousarray(values), ggml_type(kind))
    return result


def keep_blocks(blocks: Blocks | None, kind: str) -> NDArray[np.uint8] | None:
    """MLX's blocks as GGUF's, when `kind` says exactly the same numbers; else None."""
    if blocks is None:
        return None
    if kind == "mxfp4":
        return mxfp4_bytes(blocks.codes, blocks.scales) if blocks.mode == "mxfp4" else None
    bits, offset = CODED[kind]
    if blocks.mode != "affine" or blocks.bits != bits or blocks.biases is None:
        return None
    d, m = blocks.scales.astype(np.float16), blocks.biases.astype(np.float16)
    if not np.array_equal(d.astype(np.float32), blocks.scales):
        return None
    if offset is None:
        if not np.array_equal(m.astype(np.float32), blocks.biases):
            return None
        return coded_bytes(blocks.codes, kind, d, m)
    if not np.array_equal(blocks.biases, -offset * blocks.scales):
        return None
    return coded_bytes(blocks.codes, kind, d, None)


def halves(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The low four bits of blocks [n, 32] as ggml packs them: value i and value i + 16 in one byte."""
    low = codes & 15
    return np.asarray(low[:, :16] | (low[:, 16:] << 4), dtype=np.uint8)


def coded_bytes(
    codes: NDArray[np.uint8], kind: str, d: NDArray[np.float16], m: NDArray[np.float16] | None
) -> NDArray[np.uint8]:
    """Blocks of an integer type: scale, minimum if it has one, fifth bits if it has them, codes."""
    flat = codes.reshape(-1, BLOCK)
    parts = [d.reshape(-1, 1).view(np.uint8)]
    if m is not None:
        parts.append(m.reshape(-1, 1).view(np.uint8))
    if kind == "q8_0":
        parts.append((flat.astype(np.int16) - 128).astype(np.int8).view(np.uint8))
    else:
        if kind in ("q5_0", "q5_1"):
            parts.append(np.packbits(flat >> 4, axis=-1, bitorder="little"))
        parts.append(halves(flat))
    return np.concatenate(parts, axis=-1).reshape(codes.shape[0], -1)


def mxfp4_bytes(codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """MXFP4 blocks: the E8M0 scale, then the E2M1 codes."""
    flat = codes.reshape(-1, BLOCK)
    return np.concatenate([scales.reshape(-1, 1), halves(flat)], axis=-1).reshape(codes.shape[0], -1)


def decode_blocks(data: NDArray[np.uint8], kind: str, width: int) -> Blocks:
    """GGUF's blocks as MLX's: the inverse of `keep_blocks`. `data` is [rows, bytes]."""
    _, size = block_size(kind)
    rows = data.shape[0]
    flat = data.reshape(-1, size)
    if kind == "mxfp4":
        codes = unhalved(flat[:, 1:17])
        return Blocks("mxfp4", 4, codes.reshape(rows, width), flat[:, 0].reshape(rows, -1), None)
    bits, offset = CODED[kind]
    d = np.ascontiguousarray(flat[:, :2]).view(np.float16).astype(np.float32)
    at = 2
    if offset is None:
        biases = np.ascontiguousarray(flat[:, 2:4]).view(np.float16).astype(np.float32)
        at = 4
    else:
        biases = -offset * d
    if kind == "q8_0":
        codes = (np.ascontiguousarray(flat[:, at:]).view(np.int8).astype(np.int16) + 128).astype(np.uint8)
    else:
        fifth = np.zeros((len(flat), BLOCK), dtype=np.uint8)
        if bits == 5:
            fifth = np.unpackbits(np.ascontiguousarray(flat[:, at : at + 4]), axis=-1, bitorder="little")
            at += 4
        codes = np.asarray(unhalved(flat[:, at:]) | (fifth << 4), dtype=np.uint8)
    return Blocks("affine", bits, codes.reshape(rows, width), d.reshape(rows, -1), biases.reshape(rows, -1))


def unhalved(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inverse of `halves`."""
    return np.concatenate([data & 15, data >> 4], axis=-1)
