"""The doors: `export` and `import_`, thin dispatch over the table in `formats`.

Options of a format are one dataclass beside its code, and one parameter of `export` or `import_` below. An option group
that the chosen format does not have is refused, not ignored.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora.commands import command
from mlxlora.errors import ConfigError, MlxLoraError, Problem
from mlxlora.files import human_bytes, new_directory, new_file
from mlxlora.progress import Progress
from mlxlora_convert.formats import FORMATS, Format, find, module, recognise
from mlxlora_convert.gguf_options import GGUFImportOptions, GGUFOptions
from mlxlora_convert.hf_options import HuggingFaceOptions
from mlxlora_convert.jobs import ExportJob, ImportJob
from mlxlora_convert.lmstudio_options import LMStudioOptions
from mlxlora_convert.mlx_options import MlxOptions
from mlxlora_convert.mlxlm_options import MlxLmOptions
from mlxlora_convert.ollama_options import OllamaOptions
from mlxlora_convert.peft_export import PeftOptions
from mlxlora_convert.probe import NotReadBack, Probe, ReadBack


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export wrote.

    out:   the published directory or file
    files: names of what was written, relative to a directory
    bytes: their size together
    check: what the format's real reader saw, or None
    notes: what a person should know: what was folded, left out or not checked
    next:  the command that comes next
    """

    format: str
    out: Path
    files: tuple[str, ...]
    bytes: int
    check: ReadBack | None
    notes: tuple[str, ...]
    next: str

    def __str__(self) -> str:
        count = f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        lines = [f"{self.out}: {FORMATS[self.format].title}, {count}, {human_bytes(self.bytes)}"]
        lines += [str(self.check)] if self.check else []
        return "\n".join([*lines, *self.notes, "", f"next: {self.next}"])


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What an import wrote: `out`, readable wherever mlxlora asks for an adapter or a model; `next` tries it."""

    format: str
    source: Path
    out: Path
    notes: tuple[str, ...]
    next: str

    def __str__(self) -> str:
        head = f"{self.out}: read from {self.source} ({FORMATS[self.format].title})"
        return "\n".join([head, *self.notes, "", f"next: {self.next}"])


def export(
    model: str,
    to: str,
    out: Path,
    *,
    adapter: list[str] | None = None,
    any_base: bool = False,
    check: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    peft: PeftOptions | None = None,
    mlx: MlxOptions | None = None,
    gguf: GGUFOptions | None = None,
    hf: HuggingFaceOptions | None = None,
    ollama: OllamaOptions | None = None,
    lmstudio: LMStudioOptions | None = None,
    on_progress: Progress | None = None,
) -> ExportResult:
    """Write a model or an adapter in another program's format.

    The result appears at `out` whole or not at all, after the format's real reader has agreed with us on a probe text.

    Args:
        model: the base model: a directory or hub id
        to: the format: peft, mlx-lm, gguf-lora (adapters), mlx, hf, gguf, ollama, lmstudio (models)
        out: the directory or file to write; must not exist
        adapter: adapters to export, or to fold into the model: `PATH` or `PATH=SCALE`; a run directory will do
        any_base: take adapters that were made for another model of the same shapes, such as a quantized form of it
        check: run the format's real reader on the result, when it is installed, and compare log-probabilities
        revision: branch, tag or commit of a hub id
        trust_remote_code: allow code that the model directory brings along
        peft: options of `--to peft`
        mlx: options of `--to mlx`
        gguf: options of `--to gguf`
        hf: options of `--to hf`
        ollama: options of `--to ollama`
        lmstudio: options of `--to lmstudio`

    Raises ConfigError for options that the format does not have, UnsupportedError for what the format cannot say.
    """
    chosen = find(to, "writer")
    options = _options(
        f"--to {to}", chosen.options, peft=peft, mlx=mlx, gguf=gguf, hf=hf, ollama=ollama, lmstudio=lmstudio
    )
    if chosen.adapter and not adapter:
        raise ConfigError(f"--to {to} writes an adapter, and none was given: name one with --adapter.")
    out = Path(out)
    if chosen.suffix and out.suffix != chosen.suffix:
        raise ConfigError(f"--to {to} writes one file: --out must end in {chosen.suffix}, not '{out.name}'.")
    with (new_file if chosen.suffix else new_directory)(out) as scratch:
        adapters = tuple(adapter or ())
        job = ExportJob(scratch, model, options, revision, trust_remote_code, on_progress, adapters, any_base, out)
        notes = list(module(chosen.writer).write(job))
        seen = _read_back(chosen, job, notes) if check else None
        files = [scratch] if scratch.is_file() else sorted(path for path in scratch.rglob("*") if path.is_file())
        names = tuple(path.name if path == scratch else str(path.relative_to(scratch)) for path in files)
        size = sum(path.stat().st_size for path in files)
    words = [word.replace("{out}", str(out)) for word in chosen.after]
    after = shlex.join(words) if words else command("upload", out, repo="OWNER/NAME")
    return ExportResult(to, out, names, size, seen, tuple(notes), after)


def import_(
    source: Path,
    out: Path,
    *,
    model: str | None = None,
    format: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    mlx_lm: MlxLmOptions | None = None,
    gguf: GGUFImportOptions | None = None,
    on_progress: Progress | None = None,
) -> ImportResult:
    """Read an adapter or a model from another program's format.

    The result appears at `out` whole or not at all.

    Args:
        source: the directory or file to read
        out: the directory to write; must not exist
        model: the base model that an adapter belongs to: a directory or hub id
        format: what `source` is; found from its files when not given
        revision: branch, tag or commit of a hub id
        trust_remote_code: allow code that the model directory brings along
        mlx_lm: options of `--format mlx-lm`
        gguf: options of `--format gguf`

    Raises FormatError for files that do not hold what their format promises, AdapterError for an adapter of another
    model, UnsupportedError for what we have no form for.
    """
    source, out = Path(source), Path(out)
    name = format if format is not None else recognise(source)
    chosen = find(name, "reader")
    options = _options(f"--format {name}", chosen.read_options, mlx_lm=mlx_lm, gguf=gguf)
    with new_directory(out) as scratch:
        job = ImportJob(scratch, model, options, revision, trust_remote_code, on_progress, source)
        notes = module(chosen.reader).read(job)
    trial = command("chat", model=model, adapter=out) if chosen.adapter else command("chat", model=out)
    return ImportResult(name, source, out, tuple(notes), trial)


def _options(chosen: str, allowed: tuple[str, ...], **given: Any) -> tuple[Any, ...]:
    """The given option groups. Raises ConfigError for those that the chosen format does not take."""
    set_ = {group: value for group, value in given.items() if value is not None}
    foreign = [group for group in set_ if group not in allowed]
    if foreign:
        has = ", ".join(f"--{group}.*" for group in allowed) or "no options"
        raise ConfigError.of(
            "Options of another format:",
            [Problem(f"--{group}.*", f"{chosen} does not have them", f"It has {has}") for group in foreign],
        )
    return tuple(set_.values())


def _read_back(chosen: Format, job: ExportJob, notes: list[str]) -> ReadBack | None:
    """Let the real reader read what was written. Raises MlxLoraError when it sees another model."""
    try:
        seen: ReadBack = module(chosen.writer).read_back(job, Probe(job))
    except NotReadBack as reason:
        notes.append(str(reason))
        return None
    if not seen.difference <= seen.bound:
        raise MlxLoraError(
            f"{seen}: more than {seen.bound:g}, so this is not the same model. Nothing was written. "
            "Please report this with the model's config.json; --check false writes it all the same."
        )
    return seen
