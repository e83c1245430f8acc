"""A LoRA adapter as a GGUF file, which llama.cpp lays over a GGUF model.

llama.cpp knows one alpha for the whole file and multiplies every product with alpha / rank. What rsLoRA, patterns of
ranks or of alphas make of that goes into B. In llama.cpp's order of dimensions A is [in, r] and B is [r, out], which in
the order of NumPy is a: (r, in), b: (out, r); for token embeddings a: (vocabulary, r), b: (width, r).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora import weights
from mlxlora.errors import AdapterError, Problem, UnsupportedError
from mlxlora.files import free_space, human_bytes, new_file, scratch_directory
from mlxlora_convert.gguf_architectures import Family, Tensors
from mlxlora_convert.gguf_check import BOUNDS, GELU, READER, TABLE_BOUND, read
from mlxlora_convert.gguf_file import export_gguf, language_config
from mlxlora_convert.gguf_metadata import Values, check_family
from mlxlora_convert.gguf_tensors import Planned, each_module, query_factor, rotary_order
from mlxlora_convert.gguf_write import write_file
from mlxlora_convert.jobs import ExportJob
from mlxlora_convert.lowrank import LowRank
from mlxlora_convert.ours import BaseModel, read_one
from mlxlora_convert.probe import NotReadBack, Probe, ReadBack
from mlxlora_convert.safetensors_rows import Floats
from mlxlora_convert.weight_rows import Numbers

FUSE = "Fold it into the model instead: mlxlora export --to gguf --adapter …"
SMALL = 1 << 30  # a base up to this size is written in float32 for the check, a larger one in float16


@dataclass(frozen=True, slots=True)
class GGUFLoraResult:
    """What was written: the file, its size, how many modules, llama.cpp's alpha, and in how many B had to change."""

    path: Path
    bytes: int
    modules: int
    alpha: float
    folded: int


def export_gguf_lora(adapter: str, model: str, out_file: Path) -> GGUFLoraResult:
    """Write an adapter (`PATH` or `PATH=SCALE`) of a model directory as a GGUF LoRA file.

    Raises UnsupportedError for DoRA, whole weights, and modules that llama.cpp applies no LoRA to; AdapterError for an
    adapter of another model.
    """
    return write_adapter((adapter,), BaseModel.open(model), out_file)


def write_adapter(specs: tuple[str, ...], base: BaseModel, out_file: Path, *, any_base: bool = False) -> GGUFLoraResult:
    """`export_gguf_lora` for a base that is open already."""
    config = language_config(base.path)
    family = check_family(config)
    _, parts = read_one(specs, base, any_base=any_base)
    refuse(parts, tied=not any(place.endswith("lm_head") for place in base.places))
    places = modules_of(family, config)
    unknown = [path for path in parts if path.removeprefix("language_model.") not in places]
    if unknown:
        problems = [Problem(path, f"has no place in GGUF's {family.gguf}", FUSE) for path in unknown]
        raise AdapterError.of("Modules that cannot be said in GGUF:", problems)
    alpha = Counter(part.scale * part.rank for part in parts.values()).most_common(1)[0][0]
    tensors: list[Planned] = []
    folded = 0
    for path, part in sorted(parts.items()):
        name, entry = places[path.removeprefix("language_model.")]
        factor = part.scale * part.rank / alpha
        folded += abs(factor - 1) > 1e-6
        a, b = factors(entry, part, config, factor)
        tensors += [Planned(f"{name}.weight.lora_{side}", Numbers(x), "f32") for side, x in (("a", a), ("b", b))]
    values: Values = {
        "general.type": ("string", "adapter"),
        "general.name": ("string", out_file.stem),
        "adapter.type": ("string", "lora"),
        "adapter.lora.alpha": ("float32", alpha),
    }
    with new_file(out_file) as scratch:
        written = write_file(scratch, family.gguf, values, None, tensors)
    return GGUFLoraResult(out_file, written.bytes, len(parts), alpha, folded)


def refuse(parts: dict[str, LowRank], *, tied: bool) -> None:
    """Raise UnsupportedError for what a GGUF adapter cannot say."""
    if any(part.magnitude is not None for part in parts.values()):
        raise UnsupportedError(f"A GGUF adapter cannot say DoRA. {FUSE}")
    tables = [path for path, part in parts.items() if part.kind == "embedding"]
    if tables and tied:
        raise UnsupportedError(
            f"{tables[0]} is the head of this model too, and llama.cpp cannot apply one LoRA to both. {FUSE}"
        )
    if not any(part.scale for part in parts.values()):
        raise UnsupportedError("The scale of this adapter is 0: there is nothing to write.")


def modules_of(family: Family, config: dict[str, Any]) -> dict[str, tuple[str, Tensors]]:
    """GGUF's name and table entry for every module by its path in the network."""
    found = {}
    for entry, number in each_module(family, int(config["num_hidden_layers"])):
        if "norm" not in entry.gguf:
            found[entry.mlx.format(i=number)] = (entry.gguf.format(i=number), entry)
    return found


def factors(entry: Tensors, part: LowRank, config: dict[str, Any], factor: float) -> tuple[Floats, Floats]:
    """A and B of one module as GGUF keeps them, with what happens to the base weight's rows done to B's."""
    a, b = np.array(part.a, dtype=np.float32), np.array(part.b, dtype=np.float32)
    if part.kind == "embedding":
        b = b.T
    elif a.ndim == 2:
        a, b = a.T, b.T
    if entry.change == "rotary" and not config.get("rope_traditional"):
        heads = config["num_key_value_heads"] if entry.gguf.endswith("attn_k") else config["num_attention_heads"]
        order = rotary_order(b.shape[0] // heads, backwards=False)
        b = b.reshape(heads, len(order), -1)[:, order].reshape(b.shape)
    if entry.change == "query_scale":
        factor *= query_factor(config)
    return np.ascontiguousarray(a), np.ascontiguousarray(b * np.float32(factor))


def write(job: ExportJob) -> list[str]:
    """`mlxlora export --to gguf-lora`."""
    base = BaseModel.open(job.base, revision=job.revision, trust_remote_code=job.trust_remote_code)
    done = write_adapter(job.adapter, base, job.out, any_base=job.any_base)
    return [f"The scales of {done.folded} of {done.modules} modules went into B."] if done.folded else []


def read_back(job: ExportJob, probe: Probe) -> ReadBack:
    """Lay the adapter over its base in llama.cpp and hold the log-probabilities against ours.

    The base is written beside the target for it, and removed again.
    """
    base = BaseModel.open(job.base, revision=job.revision, trust_remote_code=job.trust_remote_code)
    size = sum(path.stat().st_size for path in weights.weight_files(base.path))
    kind = "f32" if size <= SMALL else "f16"
    needed = size * 8  # as if it were stored in 4 bits now
    if needed > free_space(job.out):
        free = human_bytes(free_space(job.out))
        raise NotReadBack(f"Not read back: the base model would have to be written for it, and {free} are free.")
    with scratch_directory(job.target) as folder:
        model = export_gguf(base.path, folder / "base.gguf", type=kind)  # type: ignore[arg-type]
        theirs = read(model.path, probe.tokens, probe.log_probs, adapter=job.out)
    gelu = check_family(language_config(base.path)).gguf in GELU
    return probe.compare(READER, theirs, max(BOUNDS[kind], TABLE_BOUND if gelu else 0.0))
