"""A tokenizer as GGUF's vocabulary: tokens with their types, merges or scores, special ids, chat template.

Two kinds of vocabulary exist on both sides. Byte-level BPE (`gpt2` in GGUF: merges, and a pre-tokenizer by name), and
sentencepiece's (`llama` in GGUF: a score for each token, pieces with ▁ for a space, bytes as a last resort). What is
compared and written is the tokenizer that transformers builds from the model directory, not just tokenizer.json.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from mlxlora.errors import ModelError, Problem, UnsupportedError
from mlxlora_convert import gguf_pretokenizers

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
PHI3_TOKENS, PHI3_KEPT = {"</s>", "<unk>", "<s>", "<|endoftext|>"}, {"<unk>", "<s>", "<|endoftext|>"}
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


def vocabulary(hf: Any, size: int) -> Vocabulary:
    """The vocabulary of a transformers tokenizer for a model with `size` rows of embeddings.

    Raises UnsupportedError for tokenizers that llama.cpp has no counterpart of, ModelError for ids without embedding.
    """
    backend = hf.backend_tokenizer
    state = json.loads(backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(f"A tokenizer of type {model.get('type')} cannot be written as GGUF; only BPE ones can.")
    texts = {int(number): text for text, number in backend.get_vocab(with_added_tokens=True).items()}
    beyond = sorted(number for number in texts if number >= size)
    if beyond:
        problems = [Problem(repr(texts[number]), f"id {number}") for number in beyond]
        raise ModelError.of(f"The tokenizer has ids beyond the model's {size} rows of embeddings:", problems)
    added = {int(number): token for number, token in backend.get_added_tokens_decoder().items()}
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(size)]
    types = [
        UNUSED if number not in texts else NORMAL if number not in added else added_type(added[number])
        for number in range(size)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    refuse_model_settings(model)
    if model.get("byte_fallback"):
        found = sentencepiece(state, tokens, types, merges)
    else:
        found = byte_level(state, tokens, types, merges)
    add_special(found, hf, backend)
    stripping = {token.content for token in added.values() if token.lstrip or token.rstrip}
    left = [token.content for token in added.values() if token.lstrip]
    found.strips = bool(stripping) and not left and set(tokens) >= PHI3_TOKENS and not PHI3_KEPT & stripping
    if stripping and not found.strips:
        listed = some(sorted(map(repr, stripping)))
        found.notes.append(f"llama.cpp keeps the spaces around {listed}, which this tokenizer swallows.")
    return found


def refuse_model_settings(model: dict[str, Any]) -> None:
    """Raise UnsupportedError for BPE settings that llama.cpp does not have."""
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UnsupportedError(
                f"The tokenizer's BPE model has {name} = {model[name]!r}, which llama.cpp does not do."
            )


def added_type(token: Any) -> int:
    """GGUF's type of a token that was added to the vocabulary."""
    return CONTROL if token.special else USER_DEFINED


def byte_level(state: dict[str, Any], tokens: list[str], types: list[int], merges: list[str]) -> Vocabulary:
    """Byte-level BPE, as GPT-2 introduced it."""
    notes = []
    normalizer = (state.get("normalizer") or {}).get("type")
    if normalizer == "NFC":
        notes.append(
            "llama.cpp does not normalise text to NFC first, as this tokenizer does; composed text is the same."
        )
    elif normalizer is not None:
        raise UnsupportedError(f"The tokenizer normalises text with {normalizer}, which llama.cpp does not do.")
    known = gguf_pretokenizers.find(state.get("pre_tokenizer"), ignore_merges=bool(state["model"].get("ignore_merges")))
    return Vocabulary("gpt2", known.names[0], tokens, types, merges=merges, notes=notes)


def sentencepiece(state: dict[str, Any], tokens: list[str], types: list[int], merges: list[str]) -> Vocabulary:
    """BPE over characters as sentencepiece does it: a score for each token instead of merges."""
    prefix, after_special = space_prefix(state)
    unknown = state["model"].get("unk_token")
    for number, text in enumerate(tokens):
        if types[number] in (NORMAL, CONTROL) and text == unknown:
            types[number] = UNKNOWN
        elif types[number] == NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = BYTE
    scores = scores_from_merges(tokens, types, merges)
    notes = []
    if prefix and not after_special:
        notes.append(f"llama.cpp puts {SPACE} after control tokens too, not only at the beginning of a text.")
    return Vocabulary("llama", "default", tokens, types, scores=scores, flags={"add_space_prefix": prefix}, notes=notes)


def space_prefix(state: dict[str, Any]) -> tuple[bool, bool]:
    """Whether ▁ is put before a text, and whether also after control tokens.

    Raises UnsupportedError for a tokenizer that does not treat spaces as sentencepiece does.
    """
    normalizer, splitter = state.get("normalizer"), state.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    kinds = [
        (step.get("type"), step.get("prepend"), (step.get("pattern") or {}).get("String"), step.get("content"))
        for step in steps
    ]
    replace = ("Replace", None, " ", SPACE)
    harmless = splitter is None or (splitter.get("type") == "Split" and splitter["pattern"].get("String") == " ")
    if kinds == [("Prepend", SPACE, None, None), replace] and harmless:
        return True, True
    if kinds == [replace] and harmless:
        return False, False
    if not kinds and splitter and splitter.get("type") == "Metaspace" and splitter.get("replacement") == SPACE:
        scheme = splitter.get("prepend_scheme", "always")
        return scheme != "never", scheme == "always"
    raise UnsupportedError(
        "The tokenizer treats spaces otherwise than sentencepiece does: "
        f"normalizer {normalizer}, pre_tokenizer {splitter}."
    )


def scores_from_merges(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """Scores that make sentencepiece's algorithm merge in the same order as the list of merges.

    It merges the pair whose union has the highest score, whatever the pair; so every way to cut a token in two must be
    in the list, and the merges of one token must stand together. Raises UnsupportedError where that is not so.
    """
    ids = {text: number for number, text in enumerate(tokens) if types[number] not in (UNUSED, CONTROL, USER_DEFINED)}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    ways: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        union = left + right
        first.setdefault(union, rank)
        last[union] = rank
        ways[union] = ways.get(union, 0) + 1
    scattered = [text for text in first if last[text] - first[text] + 1 != ways[text]]
    wrong = scattered[:LISTED]
    for text, number in ids.items():
        if types[number] == NORMAL and len(text) > 1:
            possible = sum(text[:cut] in ids and text[cut:] in ids for cut in range(1, len(text)))
            if possible != ways.get(text, 0):
                wrong.append(text)
    if wrong:
        raise UnsupportedError(
            f"The tokenizer's merges follow no order of scores (first at {some([repr(text) for text in wrong])}), so "
            "llama.cpp's sentencepiece would cut texts otherwise. Nothing was written."
        )
    lowest = -float(len(merges)) - 1.0
    return [
        0.0 if types[number] not in (NORMAL,) else -float(first[text]) if text in first else lowest
        for number, text in enumerate(tokens)
    ]


def add_special(found: Vocabulary, hf: Any, backend: Any) -> None:
    """Special ids, whether BOS and EOS are added, and the chat templates."""
    for theirs, ours in SPECIAL:
        number = getattr(hf, theirs, None)
        if number is not None:
            found.ids[ours] = int(number)
    plain, full = backend.encode("a", add_special_tokens=False).ids, backend.encode("a", add_special_tokens=True).ids
    start = len(full) - len(plain) - full[::-1].index(plain[-1]) if plain else 0
    before, after = full[:start], full[start + len(plain) :]
    bos, eos = found.ids.get("bos_token_id"), found.ids.get("eos_token_id")
    if (before and before != [bos]) or (after and after != [eos]):
        raise UnsupportedError(
            f"The tokenizer puts {before} before and {after} after a text; llama.cpp can only add BOS ({bos}) there "
            f"and EOS ({eos}) here."
        )
    found.flags |= {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    template = hf.chat_template
    if isinstance(template, dict):
        found.templates = {str(name): str(text) for name, text in template.items()}
    elif template:
        found.templates = {"default": str(template)}


def some(names: list[str]) -> str:
    """The first few of a list, and how many more."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
