"""`--to mlx`: a model directory for stock mlx-lm (and LM Studio), with adapters folded in.

The work is that of `mlxlora fuse` and `mlxlora convert`; here it gets the same check as every other door.
"""

from __future__ import annotations

import numpy as np

from mlxlora import mlxlm
from mlxlora.convert import convert
from mlxlora.errors import ConfigError
from mlxlora.fuse import fuse
from mlxlora.model import load_network
from mlxlora_convert.jobs import ExportJob
from mlxlora_convert.mlx_options import MlxOptions
from mlxlora_convert.probe import Probe, ReadBack, streamed

BOUND = 1e-4  # both sides run the same files through the same kernels


def write(job: ExportJob) -> list[str]:
    """Fuse the adapters into the model, or convert it where there are none."""
    options = job.option(MlxOptions)
    common = {"revision": job.revision, "trust_remote_code": job.trust_remote_code, "on_progress": job.on_progress}
    if not job.adapter:
        if options != MlxOptions():
            raise ConfigError("--mlx.* says how to fold adapters in, and none was given. See mlxlora convert.")
        convert(job.base, job.out, **common)  # type: ignore[arg-type]
        return []
    result = fuse(
        job.base,
        list(job.adapter),
        job.out,
        dequantize=options.dequantize,
        bits=options.bits,
        max_kl=options.max_kl,
        any_base=job.any_base,
        check=False,
        **common,  # type: ignore[arg-type]
    )
    return [f"{result.form}: KL {result.kl:.2g} nats a token from the adapter on its base"]


def read_back(job: ExportJob, probe: Probe) -> ReadBack:
    """Load what was written with mlx-lm's own loader, and hold it against ours on the same files."""
    theirs = streamed(lambda: mlxlm.module("utils").load_model(job.out, lazy=True, strict=True)[0], probe.tokens)
    ours = streamed(lambda: load_network(job.out, trust_remote_code=job.trust_remote_code)[0], probe.tokens)
    return ReadBack("mlx-lm", len(probe.tokens), float(np.abs(ours - theirs).max()), BOUND)
