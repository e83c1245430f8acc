"""The door to Hugging Face PEFT: an adapter directory (adapter_config.json, adapter_model.safetensors) out and in.

The numbers are in peft_export.py and peft_import.py.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from mlxlora import files
from mlxlora.errors import AdapterError, FormatError, UnsupportedError
from mlxlora_convert import base as bases
from mlxlora_convert import hf_base, transformers_reader
from mlxlora_convert.jobs import ExportJob, ImportJob
from mlxlora_convert.names import Names
from mlxlora_convert.ours import BaseModel, from_lowrank, read_one, write_checked
from mlxlora_convert.peft_config import PeftConfig
from mlxlora_convert.peft_export import PeftOptions, to_peft
from mlxlora_convert.peft_import import from_peft
from mlxlora_convert.probe import Probe, ReadBack

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PADDED_BYTES = 1 << 30  # one rank for all modules may cost this much at most, or eight times what is needed
BOUND = 1e-3


def write(job: ExportJob) -> list[str]:
    """Write an adapter of ours as a PEFT directory."""
    model = BaseModel.open(job.base, revision=job.revision, trust_remote_code=job.trust_remote_code)
    names = Names.of(model.config)
    adapter, parts = read_one(job.adapter, model, any_base=job.any_base)
    options = job.option(PeftOptions)
    options = replace(options, base=options.base or model.hub_id)
    state = to_peft(
        parts,
        names,
        model.places,
        options,
        rslora=bool(adapter.config.get("rslora")),
        dropout=adapter.dropout,
    )
    files.save_safetensors(job.out / WEIGHTS, state.tensors, {"format": "pt"})
    files.write_json(job.out / CONFIG, state.config)
    if not options.base:
        state.notes.append("The base's hub id is not known: name it with --peft.base, or when loading in PEFT.")
    return state.notes


def read(job: ImportJob) -> list[str]:
    """Read a PEFT directory into an adapter of ours, checked against its base model."""
    source = job.source if job.source.is_dir() else job.source.parent
    config = PeftConfig.read(files.read_json(source / CONFIG))
    if not (source / WEIGHTS).is_file():
        if (source / "adapter_model.bin").is_file():
            raise UnsupportedError(
                f"{source / 'adapter_model.bin'} is a pickle, which can run code when it is read. Save it again with "
                "PEFT's save_pretrained, which writes adapter_model.safetensors."
            )
        raise FormatError(f"{source / WEIGHTS} does not exist.")
    model = BaseModel.open(
        job.needs_model("PEFT adapter"), revision=job.revision, trust_remote_code=job.trust_remote_code
    )
    names = Names.of(model.config)
    tensors = files.load_safetensors(source / WEIGHTS)
    imported = from_peft(config, tensors, names, model.places, bases.tensors(model.network))
    _refuse_bloat(imported.adapter)
    adapter = from_lowrank(
        imported.adapter, model, dropout=config.dropout, config={"rslora": bool(config.raw.get("use_rslora"))}
    )
    write_checked(job.out, adapter, model)
    return [*imported.notes, *model.unlike(config.raw.get("base_model_name_or_path"))]


def _refuse_bloat(adapter: Any) -> None:
    """Our files know one rank: a few modules of full rank would fill all the others up with zeros."""
    rank = max(part.rank for part in adapter.values())
    needed = sum(part.a.nbytes + part.b.nbytes for part in adapter.values())
    padded = sum((part.a.nbytes + part.b.nbytes) // part.rank * rank for part in adapter.values())
    if padded > max(PADDED_BYTES, 8 * needed):
        widest = next(path for path, part in adapter.items() if part.rank == rank)
        raise UnsupportedError(
            f"{widest} needs rank {rank}. An adapter file has one rank, so all {len(adapter)} modules would take "
            f"{files.human_bytes(padded)} instead of {files.human_bytes(needed)}. Merge the adapter with PEFT "
            "(merge_and_unload) and convert the merged model instead."
        )


def read_back(job: ExportJob, probe: Probe) -> ReadBack:
    """Run transformers + PEFT on what was written.

    The bound leaves room for what the two programs differ in without the adapter.
    """
    transformers_reader.refuse_missing("PEFT", "peft")
    with hf_base.transformers_model(job) as model, _quiet() as seen:
        import peft

        adapted = peft.PeftModel.from_pretrained(model, str(job.out)).eval()
        lost = [str(one.message) for one in seen if "missing adapter keys" in str(one.message).lower()]
        if lost:
            raise AdapterError(f"PEFT does not find all tensors of what was written: {lost[0][:500]}")
        theirs = transformers_reader.log_probs(adapted, probe.tokens)
        with adapted.disable_adapter():
            plain = transformers_reader.log_probs(adapted, probe.tokens)
    apart = float(np.abs(plain - probe.base_log_probs[:, : plain.shape[-1]]).max())
    return probe.compare("PEFT", theirs, BOUND + 2 * apart)


@contextlib.contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Collect what PEFT warns about."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen
