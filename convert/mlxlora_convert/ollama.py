"""A directory for `ollama create`: the model as GGUF beside a Modelfile that says how to talk to it.

https://github.com/ollama/ollama/blob/main/docs/modelfile.md. Adapters are folded in: Ollama has been dropping ADAPTER.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora.errors import ConfigError, InputError
from mlxlora.files import read_json
from mlxlora.tokenizer import Tokenizer
from mlxlora_convert.gguf_check import compare
from mlxlora_convert.gguf_file import export_gguf, fused, notes_of
from mlxlora_convert.gguf_options import GGUFType
from mlxlora_convert.jobs import ExportJob
from mlxlora_convert.ollama_options import OllamaOptions
from mlxlora_convert.ollama_template import FREE, Pattern, translate
from mlxlora_convert.probe import Probe, ReadBack

GGUF, MODELFILE = "model.gguf", "Modelfile"
# generation_config.json's names and Ollama's
SAMPLING = (("temperature", "temperature"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p"),
            ("repetition_penalty", "repeat_penalty"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class OllamaResult:
    """What was written: the directory with model.gguf and Modelfile, and what a person should know."""

    path: Path
    modelfile: str
    notes: tuple[str, ...]


def export_ollama(model_dir: Path, out_dir: Path, options: OllamaOptions | None = None) -> OllamaResult:
    """Fill an existing directory with model.gguf and a Modelfile for `ollama create NAME -f Modelfile`.

    Raises UnsupportedError for a chat template that cannot be said in Ollama's language, before anything is written.
    """
    options = options or OllamaOptions()
    text, notes = modelfile(model_dir, options)
    kind: GGUFType = options.type
    written = export_gguf(model_dir, out_dir / GGUF, type=kind)
    (out_dir / MODELFILE).write_text(text, encoding="utf-8")
    return OllamaResult(out_dir, text, (*notes, *notes_of(written)))


def modelfile(model_dir: Path, options: OllamaOptions) -> tuple[str, list[str]]:
    """The Modelfile of a model directory, and what a person should know about it."""
    tokenizer = Tokenizer.load(model_dir)
    lines, notes = [f"FROM ./{GGUF}"], []
    source = tokenizer.chat_template
    if source is None:
        notes.append("The model has no chat template, and neither has the Modelfile.")
    elif options.template == "translate":
        bos = str(tokenizer.hf.bos_token) if tokenizer.adds_bos else ""
        text, pattern = translate(source, tokenizer.special_variables, bos=bos, date=options.day())
        lines += [f"TEMPLATE {quoted(text, 'chat template')}", *stops(tokenizer, pattern)]
        if pattern.system is None:
            if options.system:
                raise ConfigError(
                    f"The chat template has no place for a system prompt: leave out ollama.system, or: {FREE}"
                )
            notes.append("The chat template has no place for a system prompt; Ollama leaves it out.")
        if "tools" in source:
            notes.append("Tool calls are not translated; for them, use --ollama.template gguf.")
    if options.system:
        lines.append(f"SYSTEM {quoted(options.system, 'system prompt')}")
    lines += sampling(model_dir) + licence(model_dir, notes)
    return "\n".join(lines) + "\n", notes


def stops(tokenizer: Tokenizer, pattern: Pattern) -> list[str]:
    """PARAMETER stop for what ends an answer: EOS, and the control tokens before the next question.

    A template without control tokens there stops at the words that open the next question.
    """
    found = [str(tokenizer.hf.eos_token)] if tokenizer.hf.eos_token else []
    controls = tokenizer.control_pattern
    marks = [match[0] for match in controls.finditer(pattern.question)] if controls else []
    marks = [mark for mark in marks if mark != tokenizer.hf.bos_token]
    words = pattern.question.strip().splitlines()
    found += marks if marks else words[:1]
    # a Modelfile knows no escapes
    return [f'PARAMETER stop "{text}"' for text in dict.fromkeys(found) if '"' not in text]


def sampling(model_dir: Path) -> list[str]:
    """PARAMETER for the sampling that the model's makers recommend in generation_config.json."""
    path = model_dir / "generation_config.json"
    settings: Any = read_json(path) if path.is_file() else {}
    settings = settings if isinstance(settings, dict) else {}
    return [
        f"PARAMETER {ours} {settings[theirs]}"
        for theirs, ours in SAMPLING
        if isinstance(settings.get(theirs), int | float) and not isinstance(settings[theirs], bool)
    ]


def licence(model_dir: Path, notes: list[str]) -> list[str]:
    """LICENSE with the text of the model's licence file, if it has one."""
    found = sorted(path for path in model_dir.glob("LICEN[SC]E*") if path.is_file())
    if not found:
        return []
    text = found[0].read_text(encoding="utf-8", errors="replace")
    if '"""' in text:
        notes.append(f'{found[0].name} contains """ and was left out of the Modelfile.')
        return []
    return [f'LICENSE """{text.strip()}"""']


def quoted(text: str, what: str) -> str:
    """A text of several lines in a Modelfile. Raises InputError when it cannot be said there."""
    if '"""' in text or text.endswith('"'):
        raise InputError(f'The {what} contains """ or ends in ", which cannot be said in a Modelfile. {FREE}')
    return f'"""{text}"""'


def write(job: ExportJob) -> list[str]:
    """`mlxlora export --to ollama`."""
    job.out.mkdir(exist_ok=True)
    with fused(job) as directory:
        done = export_ollama(directory, job.out, job.option(OllamaOptions))
    return list(done.notes)


def read_back(job: ExportJob, probe: Probe) -> ReadBack:
    """Let llama.cpp, which Ollama runs on, read the model."""
    return compare(job.out / GGUF, probe, job.option(OllamaOptions).type)
