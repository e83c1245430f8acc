"""What GGUF keeps of a tokenizer: token types, the names of special tokens, and the whole as one value."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"
# transformers' name of each special token, and GGUF's
SPECIAL = (
    ("bos_token_id", "bos_token_id"),
    ("eos_token_id", "eos_token_id"),
    ("unk_token_id", "unknown_token_id"),
    ("sep_token_id", "seperator_token_id"),  # the misspelling is GGUF's
    ("pad_token_id", "padding_token_id"),
    ("mask_token_id", "mask_token_id"),
)
LISTED = 5


@dataclass
class Vocabulary:
    """What GGUF keeps of a tokenizer.

    model: `gpt2` or `llama`; pre: llama.cpp's pre-tokenizer; tokens, types, scores: one per id; merges: `left right`
    ids: special tokens by GGUF's name; flags: add_bos_token and the like; templates: chat templates by name
    strips: spaces after control tokens are swallowed, as Phi-3 does (llama.cpp does it to models named so)
    notes: what a reader does differently
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    ids: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    strips: bool = False
    notes: list[str] = field(default_factory=list)

    def named(self, name: str) -> str:
        """`name`, changed so that llama.cpp, which goes by it, treats control tokens as this tokenizer does."""
        if self.strips:
            return name if "phi-3" in name.lower() or "phi3" in name.lower() else f"{name} (phi-3 tokens)"
        return re.sub(r"(?i)(phi)-?(3)", r"\1 \2", name)


def some(names: list[str]) -> str:
    """The first few of a list, and how many more."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
