"""A base model as transformers runs it, to read back what was written for it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxlora import weights
from mlxlora.files import check_safetensors, human_bytes
from mlxlora.parameters import flat
from mlxlora_convert import huggingface
from mlxlora_convert.jobs import ExportJob
from mlxlora_convert.names import Names
from mlxlora_convert.ours import BaseModel
from mlxlora_convert.probe import NotReadBack

BYTES_PER_WEIGHT = 4  # both sides compute in float32
SHARE = 0.5  # of the machine's memory that a check may take


@contextlib.contextmanager
def transformers_model(job: ExportJob) -> Iterator[Any]:
    """The job's base model in transformers, in float32; written for it in a scratch directory where need be.

    Raises NotReadBack when it would not fit in memory or cannot be written for transformers.
    """
    model = BaseModel.open(job.base, revision=job.revision, trust_remote_code=job.trust_remote_code)
    _refuse_large(model)
    with tempfile.TemporaryDirectory(prefix=".mlxlora-base-", dir=job.out.parent) as scratch:
        path = model.path if as_transformers_wants(model) else _written(job, Path(scratch, "model"))
        yield _load(path)


def as_transformers_wants(model: BaseModel) -> bool:
    """Whether transformers reads the model's own files: not quantized, and by its own names."""
    if "quantization" in model.config or "quantization_config" in model.config:
        return False
    own = set(flat(model.network.parameters()))
    stored = {name for path in weights.weight_files(model.path) for name in check_safetensors(path)}
    family = Names.of(model.config).family
    return not stored <= own or not (family.renames or family.experts)


def _refuse_large(model: BaseModel) -> None:
    count = sum(int(np.prod(place.shape)) for place in model.places.values())
    needed, there = 2 * BYTES_PER_WEIGHT * count, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > SHARE * there:
        raise NotReadBack(
            f"Not read back: that would take {human_bytes(needed)} of memory, this machine has {human_bytes(there)}."
        )


def _written(job: ExportJob, out: Path) -> Path:
    out.mkdir()
    huggingface.write(replace(job, out=out, adapter=(), options=(), on_progress=None))
    return out


def _load(path: Path) -> Any:
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
            return transformers.AutoModelForCausalLM.from_pretrained(
                str(path), dtype=torch.float32, trust_remote_code=False
            ).eval()
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def log_probs(model: Any, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """What a transformers model says after each token: log-probabilities [tokens, vocabulary]."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([list(tokens)])).logits[0].float()
        found: npt.NDArray[np.float32] = torch.log_softmax(logits, dim=-1).numpy()
    return found
