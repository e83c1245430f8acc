"""transformers as a reader of what we write: loaded without a word, in float32, where that fits in memory."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxlora.files import human_bytes
from mlxlora.memory import machine_memory
from mlxlora_convert.probe import NotReadBack, ReaderMissing

BYTES_PER_WEIGHT = 4  # it computes in float32
SHARE = 0.5  # of the machine's memory that a check may take


def refuse_missing(reader: str, *packages: str) -> None:
    """Raise ReaderMissing where torch, transformers or one of `packages` is not installed."""
    missing = [name for name in ("torch", "transformers", *packages) if importlib.util.find_spec(name) is None]
    if missing:
        raise ReaderMissing(reader, f"pip install {' '.join(missing)}")


def refuse_large(count: int) -> None:
    """Raise NotReadBack for a model of so many weights that reading it back would take the machine's memory."""
    needed, there = BYTES_PER_WEIGHT * count, machine_memory()
    if needed > SHARE * there:
        raise NotReadBack(
            f"Not read back: that would take {human_bytes(needed)} of memory, this machine has {human_bytes(there)}."
        )


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    """A model directory in transformers, in float32, and which tensors it did not find or did not expect."""
    import torch
    import transformers
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, said = transformers.AutoModelForCausalLM.from_pretrained(
                str(path), dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
    return model.eval(), said


def log_probs(model: Any, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """What a transformers model says after each token: log-probabilities [tokens, vocabulary]."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([list(tokens)])).logits[0].float()
        found: npt.NDArray[np.float32] = torch.log_softmax(logits, dim=-1).numpy()
    return found
