"""GGUF, the format of llama.cpp: a model directory to a file, and a file to a model directory.

The tables of names and hyper-parameters are in `gguf_architectures`, number formats in `gguf_tensors`, the vocabulary
in `gguf_vocabulary`. What a file says of itself is checked by `gguf_header` before anything is read from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora import architecture, hub
from mlxlora.files import new_file, scratch_directory
from mlxlora.model import load_network, write_directory
from mlxlora.progress import Progress
from mlxlora.tokenizer import Tokenizer
from mlxlora_convert import gguf_rope
from mlxlora_convert.gguf_architectures import Family
from mlxlora_convert.gguf_check import compare
from mlxlora_convert.gguf_metadata import Values, check_family, hyperparameters
from mlxlora_convert.gguf_options import GGUFOptions, GGUFType, check_type
from mlxlora_convert.gguf_tensors import Planned, plan
from mlxlora_convert.gguf_vocabulary import vocabulary
from mlxlora_convert.gguf_write import Written, write_file
from mlxlora_convert.huggingface import folded
from mlxlora_convert.jobs import ExportJob
from mlxlora_convert.probe import Probe, ReadBack
from mlxlora_convert.weight_rows import Numbers, model_weights

# llama.cpp's number for "mostly of this type", which it shows and does not need
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32, "mxfp4": 38
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GGUFResult:
    """What was written: the file, its type and size, how many tensors, how many of them kept MLX's quantization bit
    for bit, and what a reader of the file does differently."""

    path: Path
    type: str
    bytes: int
    tensors: int
    kept: int
    notes: tuple[str, ...]


def export_gguf(
    model_dir: Path, out_file: Path, *, type: GGUFType = "f16", on_progress: Progress | None = None
) -> GGUFResult:
    """Write a model directory in MLX's layout as one GGUF file that llama.cpp, Ollama and LM Studio read.

    Quantized weights are dequantized row by row, or kept where GGUF's type is exactly the same quantization (affine 4
    and 5 bits as q4_1 and q5_1, mxfp4). The model is never in memory as a whole.
    Raises UnsupportedError for models that GGUF or llama.cpp cannot say, ModelError for weights that do not fit.
    """
    check_type(type)
    config = language_config(model_dir)
    family = check_family(config)
    tokens = vocabulary(Tokenizer.load(model_dir).hf, int(config["vocab_size"]))
    load_network(model_dir)  # names and shapes of all weights, checked against the network of config.json
    planned, notes = plan_model(model_dir, family, config, type)
    values = general(tokens.named(model_name(model_dir, config)), type) | hyperparameters(family, config)
    with new_file(out_file) as path:
        written = write_file(path, family.gguf, values, tokens, planned, on_progress)
    notes = [*notes, *tokens.notes, *architecture.silently_wrong(config)]
    return result(out_file, type, written, planned, notes)


def language_config(model_dir: Path) -> dict[str, Any]:
    """The language model's part of config.json, rotary settings in both spellings."""
    whole = architecture.spelled_both_ways(architecture.read_config(model_dir))
    inner = architecture.text_config(whole)
    if inner is whole:
        return whole
    outer: dict[str, Any] = {key: whole[key] for key in ("quantization", "quantization_config") if key in whole}
    return {**outer, **inner, "model_type": inner.get("model_type", f"{whole['model_type']}_text")}


def plan_model(
    model_dir: Path, family: Family, config: dict[str, Any], kind: GGUFType
) -> tuple[list[Planned], list[str]]:
    """Every tensor of the file, the rotary factors included."""
    # multimodal models keep their language model under a name of its own
    found = model_weights(model_dir, config)
    weights = {name.removeprefix("language_model."): weight for name, weight in found.items()}
    planned, notes = plan(family, weights, config, kind)
    factors = [Planned(name, Numbers(values), "f32") for name, values in gguf_rope.tensors(config).items()]
    return [*factors, *planned], notes


def general(name: str, kind: str) -> Values:
    """`general.*`: what the file is."""
    return {
        "general.type": ("string", "model"),
        "general.name": ("string", name),
        "general.quantization_version": ("uint32", 2),
        "general.file_type": ("uint32", FILE_TYPES[kind]),
    }


def model_name(model_dir: Path, config: dict[str, Any]) -> str:
    """The name a model was published under, or its directory's."""
    return str(config.get("_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1] or model_dir.resolve().name


def write(job: ExportJob) -> list[str]:
    """`mlxlora export --to gguf`: the model with its adapters folded in."""
    kind = job.option(GGUFOptions).type
    with fused(job) as directory:
        return notes_of(export_gguf(directory, job.out, type=kind, on_progress=job.on_progress))


def notes_of(written: GGUFResult) -> list[str]:
    """What a person should know of a file that was written."""
    kept = f"{written.kept} tensors kept MLX's quantization bit for bit." if written.kept else ""
    return [note for note in (kept, *written.notes) if note]


@contextlib.contextmanager
def fused(job: ExportJob) -> Iterator[Path]:
    """The model directory of a job; with adapters, a temporary one beside the target that they are folded into."""
    base = hub.find(job.base, revision=job.revision)
    if not job.adapter:
        yield base
        return
    with scratch_directory(job.target) as folder:
        target = folder / base.resolve().name
        target.mkdir()
        network, config = folded(job, base)
        write_directory(target, network, config, source=base, on_progress=job.on_progress)
        del network
        yield target


def read_back(job: ExportJob, probe: Probe) -> ReadBack:
    """Let llama.cpp read the file and hold its log-probabilities against ours."""
    return compare(job.out, probe, job.option(GGUFOptions).type)


def result(path: Path, kind: str, written: Written, planned: list[Planned], notes: list[str]) -> GGUFResult:
    """What was written, for whoever asked."""
    return GGUFResult(path, kind, written.bytes, len(planned), written.kept, tuple(notes))
