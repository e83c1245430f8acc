"""Which chat template is used: the model's own, one that comes with mlxlora, or a file."""

from __future__ import annotations

from pathlib import Path

from mlxlora.data.config import SamplesConfig
from mlxlora.errors import ConfigError, DataError, InputError, nearest
from mlxlora.files import read_json
from mlxlora.tokenizer import Tokenizer


def template_source(tokenizer: Tokenizer, config: SamplesConfig, *, tools: bool = False) -> str:
    """The chat template's source: the one asked for, else the model's own. Raises ConfigError or DataError."""
    if config.template is not None:
        return named_template(config.template)
    templates = tokenizer.chat_templates
    source = templates.get("tool_use") if tools else None
    source = source or templates.get("default")
    if source is None and templates:
        raise ConfigError(
            f"the model has several chat templates ({', '.join(templates)}) and no default. "
            "Save the one you want as a file and give it with --samples.template."
        )
    if source is None:
        raise DataError(
            "the rows are chats, but the model has no chat template. Give one with --samples.template "
            f"({', '.join(template_names())}, or a Jinja file), or train on 'text' or plain prompt/completion rows."
        )
    return source


def template_names() -> list[str]:
    """Names that `--samples.template` knows."""
    return sorted(path.stem for path in (Path(__file__).parent / "templates").glob("*.jinja"))


def named_template(name: str) -> str:
    """The source behind `--samples.template`: a known name, a Jinja file, or a model's tokenizer configuration."""
    if name in template_names():
        return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    path = Path(name)
    if path.is_dir() and (path / "chat_template.jinja").is_file():
        path = path / "chat_template.jinja"
    if not path.is_file():
        known = template_names()
        raise ConfigError(f"template '{name}' is neither known ({', '.join(known)}) nor a file.{nearest(name, known)}")
    try:
        if path.suffix == ".json":
            value = read_json(path)
            source = value.get("chat_template") if isinstance(value, dict) else None
            if not isinstance(source, str):
                raise ConfigError(f"{path} holds no chat_template.")
            return source
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text.") from None
