"""The doors: `export` and `import_`, thin dispatch over one table of formats.

A format is one or two modules of this package, named in `FORMATS`: one that reads, and one that writes and reads back.

    write(job: ExportJob) -> list[str]                 fill job.out, which export() publishes by rename; returns notes
    read(job: ImportJob) -> list[str]                  fill job.out from job.source; returns notes
    read_back(job: ExportJob, probe: Probe) -> ReadBack  run the format's real reader on job.out; raises NotReadBack

Options of a format are one dataclass beside its code, and one parameter of `export` or `import_` below. An option group
that the chosen format does not have is refused, not ignored.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from mlxlora.errors import ConfigError, MlxLoraError, Problem, UnsupportedError, nearest
from mlxlora.files import human_bytes, new_directory, refuse_existing, sync
from mlxlora.progress import Progress
from mlxlora_convert.gguf_options import GGUFImportOptions, GGUFOptions
from mlxlora_convert.hf_options import HuggingFaceOptions
from mlxlora_convert.lmstudio_options import LMStudioOptions
from mlxlora_convert.mlx_options import MlxOptions
from mlxlora_convert.mlxlm_options import MlxLmOptions
from mlxlora_convert.ollama_options import OllamaOptions
from mlxlora_convert.peft_export import PeftOptions
from mlxlora_convert.probe import NotReadBack, Probe, ReadBack

Options = TypeVar("Options")


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
    """

    title: str
    writer: str | None = None
    reader: str | None = None
    options: tuple[str, ...] = ()
    read_options: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    suffix: str = ""
    adapter: bool = False


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
    ),
    "lmstudio": Format(
        "LM Studio model",
        writer="lmstudio",
        options=("lmstudio",),
    ),
}


@dataclass(frozen=True, slots=True)
class Job:
    """What the functions of a format are handed.

    out:     where to write: a scratch directory or file of the final name, published by rename afterwards
    options: the option groups that were given; ask for one with `option(Type)`
    """

    out: Path
    model: str | None
    options: tuple[Any, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False
    on_progress: Progress | None = None

    def option(self, kind: type[Options]) -> Options:
        """The option group of this type as given, or its defaults."""
        return next((given for given in self.options if isinstance(given, kind)), kind())

    def progress(self, what: str, done: int, total: int) -> None:
        """Report progress to whoever listens."""
        if self.on_progress is not None:
            self.on_progress(what, done, total)


@dataclass(frozen=True, slots=True)
class ExportJob(Job):
    """Write `model` (a directory or hub id), with `adapter` (`PATH` or `PATH=SCALE`, any number), to `out`.

    any_base: take adapters that were made for another model, as long as all shapes fit
    target:   where `out` will be published
    """

    adapter: tuple[str, ...] = ()
    any_base: bool = False
    target: Path = field(default_factory=Path)

    @property
    def base(self) -> str:
        """The model; an export always has one."""
        assert self.model is not None
        return self.model


@dataclass(frozen=True, slots=True)
class ImportJob(Job):
    """Read `source` into `out`; `model` is the base that an adapter belongs to."""

    source: Path = field(default_factory=Path)

    def needs_model(self, title: str) -> str:
        """The base model. Raises ConfigError when none was given, for formats that cannot be read without."""
        if self.model is None:
            raise ConfigError(f"Reading a {title} needs the base model it belongs to: give it with --model.")
        return self.model


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export wrote.

    out:   the published directory or file
    files: names of what was written, relative to a directory
    bytes: their size together
    check: what the format's real reader saw, or None
    notes: what a person should know: what was folded, left out or not checked
    """

    format: str
    out: Path
    files: tuple[str, ...]
    bytes: int
    check: ReadBack | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.out}: {FORMATS[self.format].title}, {len(self.files)} files, {human_bytes(self.bytes)}"]
        lines += [str(self.check)] if self.check else []
        folder = self.out if FORMATS[self.format].suffix == "" else self.out.parent
        return "\n".join([*lines, *self.notes, "", f"next: mlxlora upload {folder} --repo OWNER/NAME"])


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
    chosen = _format(to, "writer")
    options = _options(
        f"--to {to}", chosen.options, peft=peft, mlx=mlx, gguf=gguf, hf=hf, ollama=ollama, lmstudio=lmstudio
    )
    if chosen.adapter and not adapter:
        raise ConfigError(f"--to {to} writes an adapter, and none was given: name one with --adapter.")
    out = Path(out)
    if chosen.suffix and out.suffix != chosen.suffix:
        raise ConfigError(f"--to {to} writes one file: --out must end in {chosen.suffix}, not '{out.name}'.")
    with _scratch(out, file=bool(chosen.suffix)) as scratch:
        adapters = tuple(adapter or ())
        job = ExportJob(scratch, model, options, revision, trust_remote_code, on_progress, adapters, any_base, out)
        notes = list(module(chosen.writer).write(job))
        seen = _read_back(chosen, job, notes) if check else None
        files = [scratch] if scratch.is_file() else sorted(path for path in scratch.rglob("*") if path.is_file())
        names = tuple(path.name if path == scratch else str(path.relative_to(scratch)) for path in files)
        size = sum(path.stat().st_size for path in files)
    return ExportResult(to, out, names, size, seen, tuple(notes))


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
    chosen = _format(name, "reader")
    options = _options(f"--format {name}", chosen.read_options, mlx_lm=mlx_lm, gguf=gguf)
    with new_directory(out) as scratch:
        job = ImportJob(scratch, model, options, revision, trust_remote_code, on_progress, source)
        notes = module(chosen.reader).read(job)
    trial = f"mlxlora chat --model {model} --adapter {out}" if chosen.adapter else f"mlxlora chat --model {out}"
    return ImportResult(name, source, out, tuple(notes), trial)


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
    looked = "\n".join(
        f"  {name}: {', '.join(known.marks)}" for name, known in FORMATS.items() if known.reader and known.marks
    )
    what = f"could be {' or '.join(found)}" if found else "is in no format that can be read"
    if any(path.name == "config.json" for path in names):
        raise ConfigError(f"{source} looks like a model of Hugging Face or MLX. Use mlxlora convert for it.")
    raise ConfigError(f"{source} {what}. Say which with --format. A format is recognised by:\n{looked}")


def _format(name: str, direction: Literal["writer", "reader"]) -> Format:
    possible = [known for known, entry in FORMATS.items() if getattr(entry, direction)]
    if name not in FORMATS:
        raise ConfigError(f"'{name}' is no known format.{nearest(name, possible)} Known: {', '.join(possible)}.")
    if name not in possible:
        verb = {"writer": "written", "reader": "read"}[direction]
        raise UnsupportedError(f"{FORMATS[name].title} cannot be {verb}. Possible: {', '.join(possible)}.")
    return FORMATS[name]


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


def module(name: str | None) -> Any:
    """A module of this package, imported when it is needed."""
    assert name is not None  # `_format` has looked
    return importlib.import_module(f"mlxlora_convert.{name}")


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


@contextlib.contextmanager
def _scratch(out: Path, *, file: bool) -> Iterator[Path]:
    """A scratch directory or file of the same name as `out` that becomes `out` by rename."""
    if not file:
        with new_directory(out) as directory:
            yield directory
        return
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.tmp-", dir=out.parent) as folder:
        path = Path(folder, out.name)
        yield path
        sync(path)
        path.rename(out)
    sync(out.parent)
