"""A model card (README.md of a hub repository), written from what a run left behind. It names no local path."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxlora import files
from mlxlora.errors import InputError
from mlxlora.reporting import jsonl
from mlxlora.version import __version__
from mlxlora_convert.ours import HUB_ID

SETTINGS = ("adapter", "optimizer", "training", "samples")  # parts of config.yaml that a card tells
HIDDEN = ("cache", "columns", "template", "validation")  # settings that may hold paths or private names


@dataclass(frozen=True, slots=True)
class Run:
    """What a run directory tells: its settings, and the events of metrics.jsonl."""

    settings: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path) -> Run:
        """Read `config.yaml` and `metrics.jsonl`; either may be missing."""
        settings = files.read_yaml(directory / "config.yaml") if (directory / "config.yaml").is_file() else {}
        if not isinstance(settings, dict):
            raise InputError(f"{directory / 'config.yaml'} holds no settings.")
        return cls(settings, list(jsonl.read(directory / "metrics.jsonl")))

    def last(self, event: str) -> dict[str, Any]:
        """The newest event of a kind; empty when there is none."""
        return next((one for one in reversed(self.events) if one.get("event") == event), {})

    def first(self, event: str) -> dict[str, Any]:
        """The oldest event of a kind; empty when there is none."""
        return next((one for one in self.events if one.get("event") == event), {})


@dataclass(frozen=True, slots=True)
class Subject:
    """What the card is about.

    repo:    its name on the hub
    what:    `adapter`, `peft`, `model` or `gguf`
    base:    the base model: a hub id, or a bare name
    license: identifier for the hub, or empty
    """

    repo: str
    what: str
    base: str = ""
    license: str = ""


def card(subject: Subject, run: Run) -> str:
    """The text of README.md."""
    body = [
        f"# {subject.repo.partition('/')[2] or subject.repo}",
        _about(subject),
        _use(subject),
        _data(run),
        _results(run),
        _settings(run),
        f"Made with mlxlora {__version__}.",
    ]
    return _header(subject) + "\n\n".join(part for part in body if part) + "\n"


def _header(subject: Subject) -> str:
    """The part that the hub reads."""
    library = {"peft": "peft", "gguf": "gguf"}.get(subject.what, "mlx")
    adapter = subject.what in ("adapter", "peft")
    tags = ["mlxlora", *(["lora"] if adapter else []), *(["mlx"] if library == "mlx" else [])]
    lines = ["---"]
    if HUB_ID.fullmatch(subject.base):
        lines += [f"base_model: {subject.base}", f"base_model_relation: {'adapter' if adapter else 'finetune'}"]
    lines += [f"library_name: {library}", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    if subject.license:
        lines.append(f"license: {subject.license}")
    return "\n".join([*lines, "---", "", ""])


def _about(subject: Subject) -> str:
    base = f"`{subject.base}`" if subject.base else "its base model"
    return {
        "adapter": f"A LoRA adapter for {base}, in the layout of mlx-lm.",
        "peft": f"A LoRA adapter for {base}, in the layout of Hugging Face PEFT.",
        "gguf": f"{base} fine-tuned, as GGUF for llama.cpp.".capitalize() if not subject.base else
        f"{base}, fine-tuned, as GGUF for llama.cpp.",
    }.get(subject.what, f"{base}, fine-tuned." if subject.base else "A fine-tuned model.")  # fmt: skip


def _use(subject: Subject) -> str:
    base = subject.base if HUB_ID.fullmatch(subject.base) else "BASE"
    name = subject.repo.partition("/")[2]
    code = {
        "adapter": f"hf download {subject.repo} --local-dir {name}\nmlxlora chat --model {base} --adapter {name}",
        "peft": (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
            f'model = PeftModel.from_pretrained(model, "{subject.repo}")'
        ),
        "gguf": f"llama-cli -hf {subject.repo}",
    }.get(subject.what, f"mlxlora chat --model {subject.repo}")
    return f"## Use\n\n```{'python' if subject.what == 'peft' else 'sh'}\n{code}\n```"


def _data(run: Run) -> str:
    data = run.last("data")
    if not data:
        return ""
    rows = [
        ("Samples", data.get("samples")),
        ("Validation samples", data.get("validation_samples")),
        ("Tokens", data.get("tokens")),
        ("Tokens trained on", data.get("trained_tokens")),
        ("Shortest, longest sample", f"{data.get('shortest'):,}, {data.get('longest'):,} tokens"),
    ]
    return "## Data\n\n" + _table(("", ""), [(name, _number(value)) for name, value in rows if value is not None])


def _results(run: Run) -> str:
    finished, before, step = run.last("finished"), run.first("validation"), run.last("step")
    rows: list[tuple[str, Any]] = []
    if before.get("step") == 0:
        rows.append(("Validation loss before training", before.get("loss")))
    if finished.get("best_loss") is not None:
        rows.append((f"Best validation loss (step {finished.get('best_step')})", finished.get("best_loss")))
    if step:
        rows.append((f"Training loss at the end (step {step.get('step')})", step.get("loss")))
        rows.append(("Epochs", step.get("epoch")))
    return "## Results\n\n" + _table(("", ""), [(name, _number(value)) for name, value in rows]) if rows else ""


def _settings(run: Run) -> str:
    rows = [
        (f"{group}.{name}", f"`{value}`")
        for group in SETTINGS
        for name, value in dict(run.settings.get(group) or {}).items()
        if name not in HIDDEN and value not in (None, {}, [], "")
    ]
    return "## Settings\n\n" + _table(("Setting", "Value"), rows) if rows else ""


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if math.isfinite(value) else "not a number"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)
