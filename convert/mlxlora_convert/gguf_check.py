"""A GGUF file held against our own forward pass, by llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlxlora_convert.gguf_header import read_header
from mlxlora_convert.llamacpp import LlamaCpp
from mlxlora_convert.probe import Probe, ReadBack

# Up to which difference of a log-probability the two are the same model. Measured on tiny random models and doubled:
# what is left is rounding to the type, and llama.cpp's rounding of activations to 8 bits beside quantized weights.
BOUNDS = {
    "f32": 2e-3, "f16": 0.1, "bf16": 0.5, "q8_0": 0.5, "q5_0": 2.5, "q5_1": 2.5, "q4_0": 6.0, "q4_1": 6.0, "mxfp4": 6.0
}  # fmt: skip
TABLE_BOUND = 0.03  # llama.cpp looks GELU up in a table of float16 values
GELU = ("gemma2", "gemma3", "starcoder2")
TOP = 2000  # how many of the likeliest tokens are compared where the vocabulary is larger
LIKELY = float(np.log(1e-4))  # below, a quantized model's log-probabilities say nothing


def compare(path: Path, probe: Probe, kind: str) -> ReadBack:
    """Read `path` with llama.cpp and compare log-probabilities over the probe's tokens.

    Raises ReaderMissing when llama.cpp is not installed, ReaderError when it refuses the file.
    """
    architecture = read_header(path).architecture
    tokens, ours = probe.tokens, probe.log_probs
    with LlamaCpp(path, context=max(256, len(tokens) + 8)) as reader:
        theirs = reader.log_probs(tokens, ours.shape[-1], min(ours.shape[-1], TOP))
    theirs = np.where(np.isnan(theirs), ours, theirs)
    bound = BOUNDS[kind]
    if kind not in ("f32", "f16", "bf16"):
        theirs = np.where(ours < LIKELY, ours, theirs)
    if architecture in GELU:
        bound = max(bound, TABLE_BOUND)
    return probe.compare("llama.cpp", theirs, bound)
