"""A GGUF file held against our own forward pass, by llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlxlora.files import free_space, human_bytes, scratch_directory
from mlxlora.model import load_network
from mlxlora_convert.gguf_header import read_header
from mlxlora_convert.llamacpp import LlamaCpp
from mlxlora_convert.probe import NotReadBack, Probe, ReadBack, streamed
from mlxlora_convert.safetensors_rows import Floats

# Up to which difference of a likely token's log-probability the two are the same model: several times what was measured
# on random models, whose logits are large. What differs is rounding: of weights to the type, and inside of llama.cpp of
# activations, to float16 or bfloat16 beside such weights and to 8 bits beside quantized ones. A tensor in a wrong place
# or order is off by 5 and more.
BOUNDS = {"f32": 2e-3, "f16": 0.3, "bf16": 1.5}
ACTIVATIONS = 1.5
READER = "llama.cpp"
TABLE_BOUND = 0.03  # llama.cpp looks GELU up in a table of float16 values
GELU = ("gemma2", "gemma3", "starcoder2")
TOP = 2000  # how many of the likeliest tokens are compared where the vocabulary is larger
LIKELY = float(np.log(1e-4))  # below, the log-probabilities of rounded models say nothing


def compare(path: Path, probe: Probe, kind: str) -> ReadBack:
    """Read `path` with llama.cpp and compare log-probabilities over the probe's tokens.

    A quantized file is held against our own forward pass over the numbers in the file: what rounding to the type costs
    is the choice of whoever chose the type.
    Raises ReaderMissing when llama.cpp is not installed, ReaderError when it refuses the file.
    """
    tokens, ours = probe.tokens, probe.log_probs
    theirs = read(path, tokens, ours)
    table = TABLE_BOUND if read_header(path).architecture in GELU else 0.0
    if kind == "f32":
        return probe.compare(READER, theirs, max(BOUNDS[kind], table))
    likely = (ours > LIKELY) | (theirs > LIKELY)
    if kind in BOUNDS:
        return probe.compare(READER, np.where(likely, theirs, ours), max(BOUNDS[kind], table))
    rounded = from_file(path, tokens)
    difference = float(np.abs(np.where(likely, theirs - rounded, 0.0)).max())
    return ReadBack(READER, len(tokens), difference, ACTIVATIONS + table)


def read(path: Path, tokens: Sequence[int], ours: Floats, adapter: Path | None = None) -> Floats:
    """llama.cpp's log-probabilities in the shape of `ours`.

    A token that is not among its likeliest is less likely than those: `ours` stands there if that is so for us, too.
    """
    with LlamaCpp(path, adapter=adapter, context=max(256, len(tokens) + 8)) as reader:
        theirs = reader.log_probs(tokens, ours.shape[-1], min(ours.shape[-1], TOP))
    least = np.nanmin(theirs, axis=-1, keepdims=True)
    return np.where(np.isnan(theirs), np.minimum(ours, least), theirs)


def from_file(path: Path, tokens: Sequence[int]) -> Floats:
    """Our own log-probabilities over the numbers in a GGUF file."""
    from mlxlora_convert.gguf_import import import_gguf

    needed, free = 2 * path.stat().st_size, free_space(path)  # the same quantization, its scales in float32
    if needed > free:
        raise NotReadBack(
            f"Not read back: for that its numbers are written beside it, which may take {human_bytes(needed)}, and "
            f"{human_bytes(free)} are free."
        )
    with scratch_directory(path) as folder:
        import_gguf(path, folder / "model", dtype="float32")
        return streamed(lambda: load_network(folder / "model")[0], tokens)
