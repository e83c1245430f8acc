"""LM Studio: a model where it looks for models, `~/.lmstudio/models/<publisher>/<model>/`.

`--out` names that directory; its last two names become publisher and model. https://lmstudio.ai/docs/app/advanced/import-model
"""

from __future__ import annotations

import re
from pathlib import Path

from mlxlora.errors import ConfigError
from mlxlora_convert import mlx_model
from mlxlora_convert.gguf_check import compare
from mlxlora_convert.gguf_file import export_gguf, fused, notes_of
from mlxlora_convert.jobs import ExportJob
from mlxlora_convert.lmstudio_options import LMStudioOptions
from mlxlora_convert.probe import Probe, ReadBack

NAME = re.compile(r"[A-Za-z0-9][\w.@-]*")
PLACE = ".lmstudio/models"


def names(target: Path) -> tuple[str, str]:
    """Publisher and model that LM Studio reads from a directory's place.

    Raises ConfigError when the directory does not stand two levels below a folder of models.
    """
    target = target.expanduser().resolve()
    publisher, model = target.parent.name, target.name
    if publisher == "models" or model == "models":
        raise ConfigError(f"LM Studio wants models/<publisher>/<model>; {target} is not two levels below 'models'.")
    for what, name in (("publisher", publisher), ("model", model)):
        if not NAME.fullmatch(name):
            raise ConfigError(f"'{name}' cannot be the {what} in LM Studio: letters, digits, . _ - only.")
    return publisher, model


def export_lmstudio(model_dir: Path, out_dir: Path, options: LMStudioOptions, *, target: Path) -> list[str]:
    """Fill an existing directory with a GGUF file named as LM Studio shows it. Returns what a person should know.

    target: where the directory will stand, `<models>/<publisher>/<model>`
    """
    written = export_gguf(model_dir, out_dir / file_name(target, options), type=options.type)
    return notes_of(written)


def file_name(target: Path, options: LMStudioOptions) -> str:
    """The name of the GGUF file in a model's directory."""
    return f"{names(target)[1]}-{options.type.upper()}.gguf"


def write(job: ExportJob) -> list[str]:
    """`mlxlora export --to lmstudio`."""
    options = job.option(LMStudioOptions)
    publisher, model = names(job.target)
    if options.form == "mlx":
        notes = mlx_model.write(job)
    else:
        job.out.mkdir(exist_ok=True)
        with fused(job) as directory:
            notes = export_lmstudio(directory, job.out, options, target=job.target)
    shown = f"LM Studio shows it as {publisher}/{model}"
    below = PLACE in job.target.expanduser().resolve().as_posix()
    return [*notes, f"{shown}." if below else f"{shown} when its models folder is the one above (usually ~/{PLACE})."]


def read_back(job: ExportJob, probe: Probe) -> ReadBack:
    """Let the engine that LM Studio would use read the model: mlx-lm or llama.cpp."""
    options = job.option(LMStudioOptions)
    if options.form == "mlx":
        return mlx_model.read_back(job, probe)
    return compare(job.out / file_name(job.target, options), probe, options.type)
