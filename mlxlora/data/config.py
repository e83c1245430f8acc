"""How rows become samples, and samples batches: the options."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mlxlora.errors import ConfigError, nearest
from mlxlora.files import refuse_no_directory

LossOn = Literal["assistant", "last", "completion", "all"]
Thinking = Literal["keep", "mask", "strip"]
TooLong = Literal["drop", "truncate", "split"]


@dataclass(frozen=True)
class SamplesConfig:
    """How rows become samples."""

    max_length: int = 2048
    """longest sample, in tokens; with packing, also the length of a packed row"""
    min_length: int = 1
    """shorter samples, in tokens, are left out"""
    too_long: TooLong = "truncate"
    """what to do with longer samples: drop them, truncate them (never all of the answer), or split (plain text only)"""
    loss_on: LossOn = "assistant"
    """which tokens are learned: every assistant turn with its end-of-turn token, the last one, everything after the
    last user message (completion), or all tokens"""
    thinking: Thinking = "keep"
    """reasoning inside assistant turns: keep it, mask it (seen, not learned), or strip it"""
    packing: bool = False
    """put several samples into one row; they cannot see each other"""
    template: str | None = None
    """chat template instead of the model's own: a known name (chatml, llama3, …) or a Jinja file"""
    prompts: Literal["auto", "chat", "plain"] = "auto"
    """how prompt/completion rows are written: as a chat, as plain text, or (auto) as a chat if there is a template"""
    preference: Literal["refuse", "chosen"] = "refuse"
    """rows for other objectives: refuse them, or learn their good endings: the chosen one of a pair, what is labelled
    true, the answer to a prompt"""
    date: str = "2024-07-26"
    """the date that templates with a date in their system prompt (Llama 3) are told; one date, so that the same data
    gives the same tokens every day"""
    format: str | None = None
    """format of the rows when it cannot be told from their keys (messages, sharegpt, alpaca, completion, text, …)"""
    columns: dict[str, str] = field(default_factory=dict)
    """keys of your rows by ours, such as {prompt: question, completion: answer}"""
    validation: Path | None = None
    """file or directory with validation rows; none: valid.* beside the training file of a directory, or a split"""
    validation_split: float = 0.05
    """share of the rows kept for validation where no validation data is given; 0 for none"""
    validation_rows: int = 1000
    """at most this many rows go to validation by the split"""
    window: int | None = None
    """plain text: length of a window in tokens (default: max_length)"""
    stride: int | None = None
    """plain text: distance between the starts of two windows (default: the window, so no overlap); tokens seen in the
    window before are not learned twice"""
    sample_start: str | None = None
    """plain text: a marker that begins a new sample inside a file"""
    keep_sample_start: bool = True
    """plain text: whether the marker itself belongs to the sample"""
    fill: bool = False
    """plain text: fill short samples with the next ones up to the window"""
    append_eos: bool = True
    """plain text: end each document with the end-of-text token"""
    end_turns: bool = False
    """end the last assistant turn with the end-of-text token where the template writes none"""
    prepend_bos: bool | None = None
    """plain text: begin each document with the beginning-of-text token (default: as the tokenizer does)"""
    allow_unusable: bool = False
    """go on when more than 1 % of the samples cannot be used"""
    cache: Path | None = None
    """where tokenised data is kept (default: ~/.cache/mlxlora, or $MLXLORA_CACHE)"""

    def __post_init__(self) -> None:
        """Raise ConfigError for values that cannot be right."""
        if self.max_length < 8:
            raise ConfigError(f"max_length is {self.max_length}; a sample needs at least 8 tokens.")
        if not 1 <= self.min_length <= self.max_length:
            raise ConfigError(f"min_length is {self.min_length}; give 1 to max_length ({self.max_length}) tokens.")
        if not 0 <= self.validation_split < 1:
            raise ConfigError(f"validation_split is {self.validation_split}; give a share from 0 to below 1.")
        if self.validation_rows < 1:
            raise ConfigError(f"validation_rows is {self.validation_rows}; give 1 or more, or validation_split 0.")
        if self.window is not None and not 8 <= self.window <= self.max_length:
            raise ConfigError(f"window is {self.window}; give 8 to max_length ({self.max_length}) tokens.")
        if self.stride is not None and not 1 <= self.stride <= (self.window or self.max_length):
            raise ConfigError(
                f"stride is {self.stride}; give 1 to the window's {self.window or self.max_length} tokens, "
                "or text between two windows is never learned."
            )
        if self.cache is not None:
            refuse_no_directory(self.cache, "cache")
        if self.sample_start == "":
            raise ConfigError("sample_start is empty; leave it out, or give the marker.")
        if self.fill and self.stride is not None:
            raise ConfigError("fill and stride contradict each other: overlapping windows are not filled up.")
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError:
            raise ConfigError(f"date is '{self.date}'; give it as YYYY-MM-DD.") from None
        unknown = set(self.columns) - set(KEYS)
        if unknown:
            name = sorted(unknown)[0]
            raise ConfigError(f"columns: '{name}' is none of our keys ({', '.join(KEYS)}).{nearest(name, KEYS)}")


KEYS = (
    "messages", "tools", "conversations", "prompt", "completion", "text", "instruction", "input", "output", "system",
    "chosen", "rejected", "label", "answer",
)  # fmt: skip
"""The keys of rows that `columns` can map."""


@dataclass(frozen=True)
class BatchConfig:
    """How samples become batches."""

    batch_size: int = 4
    """rows of a batch"""
    tokens_per_batch: int | None = None
    """tokens of a batch, padding included, instead of a fixed number of rows"""
    packing: bool = False
    """put several samples into one row; they cannot see each other"""
    max_length: int = 2048
    """length of a packed row"""
    lengths: int = 64
    """how many different row lengths there are at most"""

    def __post_init__(self) -> None:
        """Raise ConfigError for values that cannot be right."""
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; give 1 or more.")
        if self.tokens_per_batch is not None and self.tokens_per_batch < 8:
            raise ConfigError(f"tokens_per_batch is {self.tokens_per_batch}; give 8 or more.")
        if self.lengths < 1:
            raise ConfigError(f"lengths is {self.lengths}; give 1 or more.")
