"""The table of formats, and how one is found.

A format is one or two modules of this package: one that reads, and one that writes and reads back.

    write(job: ExportJob) -> list[str]                 fill job.out, which export() publishes by rename; returns notes
    read(job: ImportJob) -> list[str]                  fill job.out from job.source; returns notes
    read_back(job: ExportJob, probe: Probe) -> ReadBack  run the format's real reader on job.out; raises NotReadBack
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlxlora.errors import ConfigError, UnsupportedError, nearest


@dataclass(frozen=True, slots=True)
class Format:
    """One foreign format.

    title:     what a person calls it
    writer:    the module that writes it and runs its real reader, or None when it can only be read
    reader:    the module that reads it, or None when it can only be written
    options:   names of the option groups (parameters of `export`) that writing it takes
    read_options: those (parameters of `import_`) that reading it takes
    marks:     file names (glob) by which a directory or file of this format is recognised
    suffix:    the format is one file with this ending; empty: a directory
    adapter:   the format holds an adapter alone, so one is required
    after:     words of the command that takes what was written, `{out}`, to where it is used; empty: `mlxlora upload`
    """

    title: str
    writer: str | None = None
    reader: str | None = None
    options: tuple[str, ...] = ()
    read_options: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    suffix: str = ""
    adapter: bool = False
    after: tuple[str, ...] = ()


# One entry a format.
FORMATS: dict[str, Format] = {
    "hf": Format(
        "Hugging Face model",
        writer="huggingface",
        options=("hf",),
    ),
    "mlx": Format(
        "MLX model",
        writer="mlx_model",
        options=("mlx",),
    ),
    "peft": Format(
        "Hugging Face PEFT adapter",
        writer="peft_adapter",
        reader="peft_adapter",
        options=("peft",),
        marks=("adapter_model.safetensors", "adapter_model.bin"),
        adapter=True,
    ),
    "mlx-lm": Format(
        "mlx-lm adapter",
        writer="mlxlm_adapter",
        reader="mlxlm_adapter",
        read_options=("mlx_lm",),
        marks=("adapters.safetensors", "adapters.npz"),
        adapter=True,
    ),
    "gguf": Format(
        "GGUF model",
        writer="gguf_file",
        reader="gguf_import",
        options=("gguf",),
        read_options=("gguf",),
        marks=("*.gguf",),
        suffix=".gguf",
    ),
    "gguf-lora": Format(
        "GGUF LoRA adapter",
        writer="gguf_lora",
        suffix=".gguf",
        adapter=True,
    ),
    "ollama": Format(
        "Ollama directory (GGUF and Modelfile)",
        writer="ollama",
        options=("ollama",),
        after=("ollama", "create", "NAME", "-f", "{out}/Modelfile"),
    ),
    "lmstudio": Format(
        "LM Studio model",
        writer="lmstudio",
        options=("lmstudio",),
    ),
}


def recognise(source: Path) -> str:
    """The name of the format of a file or directory, from the names of its files.

    Raises ConfigError when no format or more than one fits.
    """
    if not source.exists():
        raise ConfigError(f"{source} does not exist.")
    names = [source] if source.is_file() else sorted(source.iterdir())
    found = [
        name
        for name, known in FORMATS.items()
        if known.reader and any(path.match(mark) for path in names for mark in known.marks)
    ]
    if len(found) == 1:
        return found[0]
    if not found and any((source / place / "adapters.safetensors").is_file() for place in ("best", "adapter")):
        raise ConfigError(f"{source} is a run: its adapter is ours already. Give it as it is, --adapter {source}.")
    looked = "\n".join(
        f"  {name}: {', '.join(known.marks)}" for name, known in FORMATS.items() if known.reader and known.marks
    )
    what = f"could be {' or '.join(found)}" if found else "is in no format that can be read"
    if any(path.name == "config.json" for path in names):
        raise ConfigError(f"{source} looks like a model of Hugging Face or MLX. Use mlxlora convert for it.")
    raise ConfigError(f"{source} {what}. Say which with --format. A format is recognised by:\n{looked}")


def find(name: str, direction: Literal["writer", "reader"]) -> Format:
    """The format of this name. Raises ConfigError, or UnsupportedError where it does not go that way."""
    possible = [known for known, entry in FORMATS.items() if getattr(entry, direction)]
    if name not in FORMATS:
        raise ConfigError(f"'{name}' is no known format.{nearest(name, possible)} Known: {', '.join(possible)}.")
    if name not in possible:
        verb = {"writer": "written", "reader": "read"}[direction]
        raise UnsupportedError(f"{FORMATS[name].title} cannot be {verb}. Possible: {', '.join(possible)}.")
    return FORMATS[name]


def module(name: str | None) -> Any:
    """A module of this package, imported when it is needed."""
    assert name is not None  # `find` has looked
    return importlib.import_module(f"mlxlora_convert.{name}")
