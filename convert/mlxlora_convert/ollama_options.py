"""Options of `--to ollama`, in a module without heavy imports."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal

from mlxlora.errors import ConfigError
from mlxlora_convert.gguf_options import GGUFType, check_type


@dataclass(frozen=True, slots=True)
class OllamaOptions:
    """Options of a directory for Ollama.

    Attributes:
        type: the number format of the weights
        system: the system prompt that the model is given when a conversation has none
        template: translate: the chat template in Ollama's language; gguf: none, so that Ollama uses the one in the file
        date: the date that a chat template which writes today's shall always write (YYYY-MM-DD)
    """

    type: GGUFType = "q8_0"
    system: str = ""
    template: Literal["translate", "gguf"] = "translate"
    date: str = ""

    def __post_init__(self) -> None:
        check_type(self.type)
        if self.template not in ("translate", "gguf"):
            raise ConfigError(f"ollama.template must be translate or gguf, not '{self.template}'.")
        if '"""' in self.system:
            raise ConfigError('ollama.system must not contain """, which ends a text in a Modelfile.')
        if self.date:
            self.day()

    def day(self) -> datetime.date | None:
        """The date as one, or None when none is given."""
        try:
            return datetime.date.fromisoformat(self.date) if self.date else None
        except ValueError:
            raise ConfigError(f"ollama.date must be a date such as 2026-01-31, not '{self.date}'.") from None
