"""GGUF in: a file of llama.cpp's becomes a model directory, quantization kept where MLX has the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlxlora import mlxlm
from mlxlora.architecture import spelled_both_ways
from mlxlora.dtypes import Dtype
from mlxlora.errors import ConfigError, FormatError, ModelError, Problem
from mlxlora.files import new_directory, write_json
from mlxlora.model import load_network
from mlxlora.parameters import flat
from mlxlora.progress import Progress
from mlxlora.tokenizer import Tokenizer
from mlxlora_convert.gguf_architectures import Family
from mlxlora_convert.gguf_header import GGUFHeader, read_header
from mlxlora_convert.gguf_metadata import configuration, read_family
from mlxlora_convert.gguf_options import GGUFImportOptions
from mlxlora_convert.gguf_read import GGUFWeight, refuse_unreadable
from mlxlora_convert.gguf_rope import FACTORS, LONG, SHORT
from mlxlora_convert.gguf_tensors import CHUNK, changed, each_module
from mlxlora_convert.gguf_tokenizer import write_tokenizer
from mlxlora_convert.jobs import ImportJob
from mlxlora_convert.safetensors_write import Entry, write_shards
from mlxlora_convert.weight_rows import Weight, pack

TAGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LARGEST = {"float32": float(np.finfo(np.float32).max), "float16": 65504.0, "bfloat16": 3.38e38}
BESIDE = (FACTORS, LONG, SHORT)  # rotary factors: they went into config.json
GROUP = 32


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """What was read: the directory, its number format, how many tensors, how many of them kept their quantization."""

    path: Path
    dtype: str
    tensors: int
    kept: int
    notes: tuple[str, ...]


def import_gguf(
    file: Path,
    out_dir: Path,
    *,
    dtype: Dtype | None = None,
    dequantize: bool = False,
    on_progress: Progress | None = None,
) -> ImportedModel:
    """Read a GGUF file into a new model directory that mlxlora and stock mlx-lm load, tokenizer included.

    q4_0, q4_1, q5_0, q5_1, q8_0 and mxfp4 are kept bit for bit as MLX's quantization with groups of 32 (unless
    `dequantize`); every other quantization becomes numbers of `dtype` (default: what most of the file is in; float16
    for quantized files).
    Raises FormatError for a malformed file, missing, unknown or misshapen tensors; UnsupportedError for an architecture
    or a tokenizer that cannot be rebuilt, and for number formats that cannot be read. Nothing is written then.
    """
    with new_directory(out_dir) as scratch:
        done = write_model(file, scratch, dtype=dtype, dequantize=dequantize, on_progress=on_progress)
    return replace(done, path=out_dir)


def write_model(
    file: Path, out_dir: Path, *, dtype: Dtype | None, dequantize: bool, on_progress: Progress | None
) -> ImportedModel:
    """`import_gguf` into a directory that is there, and that the caller publishes."""
    header = read_header(file)
    refuse_unreadable(header)
    family = read_family(header)
    check_blocks(header, family)
    config = configuration(family, header)
    weights = named(family, header, config)
    chosen = dtype or usual_dtype(header)
    entries, settings = plan(weights, chosen, dequantize)
    config = spelled_both_ways({**config, "torch_dtype": chosen} | settings)
    notes = write_tokenizer(header, out_dir, config)  # refused before much is written
    write_shards(out_dir, entries, on_progress=on_progress)
    write_json(out_dir / "config.json", config)
    load_network(out_dir)
    Tokenizer.load(out_dir)
    kept = sum(entry.name.endswith(".scales") for entry in entries)
    return ImportedModel(out_dir, chosen, len(weights), kept, tuple(notes))


def read(job: ImportJob) -> list[str]:
    """`mlxlora import FILE.gguf`."""
    options = job.option(GGUFImportOptions)
    if job.model is not None:
        raise ConfigError("A GGUF file holds a whole model, so there is no base: leave out --model.")
    done = write_model(
        the_file(job.source), job.out, dtype=options.dtype, dequantize=options.dequantize, on_progress=job.on_progress
    )
    kept = f"{done.kept} of {done.tensors} tensors kept their quantization." if done.kept else ""
    return [note for note in (kept, *done.notes) if note]


def the_file(source: Path) -> Path:
    """The GGUF file that is meant: the only one of a directory. Raises ConfigError where there are several."""
    found = sorted(source.glob("*.gguf")) if source.is_dir() else [source]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "no GGUF file"
        raise ConfigError(f"{source} holds {names}. Name one.")
    return found[0]


def check_blocks(header: GGUFHeader, family: Family) -> None:
    """Raise FormatError unless the blocks that the header counts are those that it has tensors for."""
    found = {int(match[1]) for name in header.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    said = header.metadata.get(f"{family.gguf}.block_count")
    if said != len(found) or found != set(range(len(found))) or not found:
        what = f"says {said!r}, the file has tensors of {len(found)}"
        raise FormatError.of(f"{header.path}: blocks", [Problem(f"{family.gguf}.block_count", what)])


def named(family: Family, header: GGUFHeader, config: dict[str, Any]) -> dict[str, Weight]:
    """Every tensor under its MLX name and in its MLX form, held against the network that config.json describes.

    Raises FormatError that lists missing, unknown and misshapen tensors by their names in the file.
    """
    weights: dict[str, Weight] = {}
    origin: dict[str, str] = {}
    problems: list[Problem] = []
    for entry, number in each_module(family, int(config["num_hidden_layers"])):
        base, module = entry.gguf.format(i=number), entry.mlx.format(i=number)
        for part in ("weight", "bias"):
            name = f"{base}.{part}"
            if name not in header.tensors:
                continue
            weight = changed(entry, [GGUFWeight(header.path, header.tensors[name])], config, backwards=True)
            for target, one in split(entry.change, f"{module}.{part}", weight):
                weights[target], origin[target] = one, name
    known = set(origin.values()) | set(BESIDE)
    problems += [Problem(name, "is not known in this architecture") for name in header.tensors if name not in known]
    expected = skeleton(config, set(weights), header)
    back = names_back(family, config)
    for name, shape in expected.items():
        if name not in weights:
            problems.append(Problem(back.get(name, name), f"missing, expected shape {list(shape)}"))
        elif weights[name].shape != shape:
            found = f"shape {list(weights[name].shape)}, expected {list(shape)}"
            problems.append(Problem(origin[name], found))
    extra = [Problem(origin[name], "has no place in the network") for name in weights if name not in expected]
    if problems or extra:
        raise FormatError.of(f"{header.path}: not the tensors of a {family.model_type} model", problems + extra)
    return weights


def split(change: str, name: str, weight: Weight) -> Iterator[tuple[str, Weight]]:
    """One tensor as the parameters that MLX has: norms of heads are one parameter each there."""
    if change != "per_head":
        yield name, weight
        return
    module = name.rpartition(".")[0]
    for head in range(weight.shape[0]):
        yield f"{module}.norms.{head}.weight", Row(weight, head)


class Row(Weight):
    """One row of a matrix, as a vector."""

    def __init__(self, inner: Weight, row: int) -> None:
        self.inner, self.row, self.shape = inner, row, (inner.shape[-1],)

    def floats(self, start: int, stop: int) -> Any:
        return self.inner.floats(self.row, self.row + 1)[start:stop]


def skeleton(config: dict[str, Any], given: set[str], header: GGUFHeader) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of the network that config.json describes; nothing is allocated."""
    try:
        network: nn.Module = mlxlm.build(spelled_both_ways(config))
    except (ModelError, RuntimeError, OverflowError, MemoryError, ZeroDivisionError) as error:
        raise FormatError(f"{header.path}: the hyper-parameters describe no possible network: {error}") from None
    shapes = {name: tuple(array.shape) for name, array in flat(network.parameters()).items()}
    if config["tie_word_embeddings"] and "lm_head.weight" not in given:
        shapes.pop("lm_head.weight", None)  # Gemma 3 has a head until it sees that there are no weights for it
    return shapes


def names_back(family: Family, config: dict[str, Any]) -> dict[str, str]:
    """GGUF's name for every parameter that the family may have."""
    pairs = {}
    for entry, number in each_module(family, int(config["num_hidden_layers"])):
        for part in ("weight", "bias"):
            pairs[f"{entry.mlx.format(i=number)}.{part}"] = f"{entry.gguf.format(i=number)}.{part}"
    return pairs


def usual_dtype(header: GGUFHeader) -> Dtype:
    """The number format of most weights of a file; float16 when they are quantized, which holds the scales exactly."""
    kinds: Counter[int] = Counter()
    for info in header.tensors.values():
        if len(info.shape) > 1:
            kinds[info.type] += info.nbytes
    most = kinds.most_common(1)[0][0] if kinds else 0
    return {0: "float32", 30: "bfloat16"}.get(most, "float16")  # type: ignore[return-value]


def plan(weights: dict[str, Weight], dtype: str, dequantize: bool) -> tuple[list[Entry], dict[str, Any]]:
    """What is written for every weight, and config.json's `quantization` for those that keep theirs."""
    entries: list[Entry] = []
    modes: dict[str, tuple[str, int]] = {}
    for name, weight in weights.items():
        blocks = None if dequantize or len(weight.shape) < 2 else weight.blocks(0, 1)
        module = name.removesuffix(".weight")
        if blocks is None:
            entries.append(Entry(name, TAGS[dtype], weight.shape, rows_of(name, weight, dtype)))
            continue
        modes[module] = (blocks.mode, blocks.bits)
        entries += quantized_entries(module, weight, blocks.mode, blocks.bits, dtype)
    if not modes:
        return entries, {}
    usual = Counter(modes.values()).most_common(1)[0][0]
    settings: dict[str, Any] = {"group_size": GROUP, "bits": usual[1], "mode": usual[0]}
    for module, (mode, bits) in modes.items():
        if (mode, bits) != usual:
            settings[module] = {"group_size": GROUP, "bits": bits, "mode": mode}
    return entries, {"quantization": settings, "quantization_config": settings}


def quantized_entries(module: str, weight: Weight, mode: str, bits: int, dtype: str) -> list[Entry]:
    """Codes, scales and biases of a weight that keeps its quantization."""
    outer, width = weight.shape[:-1], weight.shape[-1]

    def codes() -> Iterator[bytes]:
        for start, stop in spans(weight):
            found = weight.blocks(start, stop)
            assert found is not None
            yield pack(found.codes, bits).tobytes()

    def numbers(part: str) -> Callable[[], Iterator[bytes]]:
        def rows() -> Iterator[bytes]:
            for start, stop in spans(weight):
                values = getattr(weight.blocks(start, stop), part)
                yield values.tobytes() if values.dtype == np.uint8 else as_dtype(values, dtype, f"{module}.{part}")

        return rows

    scales = (*outer, width // GROUP)
    entries = [Entry(f"{module}.weight", "U32", (*outer, width * bits // 32), codes)]
    entries.append(Entry(f"{module}.scales", "U8" if mode == "mxfp4" else TAGS[dtype], scales, numbers("scales")))
    if mode == "affine":
        entries.append(Entry(f"{module}.biases", TAGS[dtype], scales, numbers("biases")))
    return entries


def rows_of(name: str, weight: Weight, dtype: str) -> Callable[[], Iterator[bytes]]:
    """A weight as numbers of `dtype`, a chunk of rows at a time."""

    def rows() -> Iterator[bytes]:
        for start, stop in spans(weight):
            yield as_dtype(weight.floats(start, stop), dtype, name)

    return rows


def spans(weight: Weight) -> Iterator[tuple[int, int]]:
    """The chunks of rows in which a weight is read."""
    step = max(1, CHUNK // weight.shape[-1])
    for start in range(0, weight.rows, step):
        yield start, min(start + step, weight.rows)


def as_dtype(values: Any, dtype: str, name: str) -> bytes:
    """Float32 numbers in another format, rounded to the nearest. Raises FormatError for what it cannot hold."""
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= LARGEST[dtype]:
        what = "not finite" if not np.isfinite(largest) else f"{largest:g} is too large for {dtype}"
        raise FormatError.of("A weight cannot be said:", [Problem(name, what, "Import with dtype bfloat16 or float32")])
    if dtype == "float16":
        return bytes(values.astype(np.float16).tobytes())
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return bytes(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes())
    return bytes(np.ascontiguousarray(values, dtype=np.float32).tobytes())
