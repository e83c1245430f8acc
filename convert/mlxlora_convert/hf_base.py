"""A base model as transformers runs it, to read back what was written for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora import weights
from mlxlora.files import check_safetensors, scratch_directory
from mlxlora.parameters import flat
from mlxlora_convert import huggingface, transformers_reader
from mlxlora_convert.jobs import ExportJob
from mlxlora_convert.names import Names
from mlxlora_convert.ours import BaseModel


@contextlib.contextmanager
def transformers_model(job: ExportJob) -> Iterator[Any]:
    """The job's base model in transformers, in float32; written for it in a scratch directory where need be.

    Raises NotReadBack when it would not fit in memory or cannot be written for transformers.
    """
    model = BaseModel.open(job.base, revision=job.revision, trust_remote_code=job.trust_remote_code)
    transformers_reader.refuse_large(sum(int(np.prod(place.shape)) for place in model.places.values()))
    with scratch_directory(job.target) as scratch:
        path = model.path if as_transformers_wants(model) else _written(job, scratch / "model")
        yield transformers_reader.load(path)[0]


def as_transformers_wants(model: BaseModel) -> bool:
    """Whether transformers reads the model's own files: not quantized, and by its own names."""
    if "quantization" in model.config or "quantization_config" in model.config:
        return False
    own = set(flat(model.network.parameters()))
    stored = {name for path in weights.weight_files(model.path) for name in check_safetensors(path)}
    family = Names.of(model.config).family
    return not stored <= own or not (family.renames or family.experts)


def _written(job: ExportJob, out: Path) -> Path:
    out.mkdir()
    huggingface.write(replace(job, out=out, adapter=(), options=(), on_progress=None))
    return out
