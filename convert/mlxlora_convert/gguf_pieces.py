"""Sentencepiece's vocabularies in GGUF: BPE over characters, told by scores instead of merges."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mlxlora.errors import UnsupportedError
from mlxlora_convert.gguf_tokens import (
    BYTE,
    CONTROL,
    LISTED,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    some,
)

PREPEND, REPLACE = ("Prepend", SPACE, None, None), ("Replace", None, " ", SPACE)


@dataclass(frozen=True, slots=True)
class Spaces:
    """How a tokenizer treats spaces: whether ▁ is put before a text and after control tokens, and which pieces are cut
    out of a text before anything is merged."""

    prefix: bool
    after_special: bool
    user_defined: frozenset[str] = frozenset()


def sentencepiece(state: dict[str, Any], tokens: list[str], types: list[int], merges: list[str]) -> Vocabulary:
    """The vocabulary of a tokenizer.json that was made of a sentencepiece model.

    Raises UnsupportedError for one that does not cut texts as sentencepiece's BPE does.
    """
    spaces = read_spaces(state, {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL})
    if state["model"].get("ignore_merges") and not spaces.user_defined:
        raise UnsupportedError("The tokenizer takes whole words as they are (ignore_merges), sentencepiece does not.")
    unknown = state["model"].get("unk_token")
    for number, text in enumerate(tokens):
        if types[number] in (NORMAL, CONTROL) and text == unknown:
            types[number] = UNKNOWN
        elif types[number] == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[number] = BYTE
        elif text in spaces.user_defined:
            types[number] = USER_DEFINED
    scores = scores_from_merges(tokens, types, merges)
    # llama.cpp looks for these before it turns spaces into ▁
    shown = [
        text.replace(SPACE, " ") if kind == USER_DEFINED else text for text, kind in zip(tokens, types, strict=True)
    ]
    notes = []
    if spaces.prefix and not spaces.after_special:
        notes.append(f"llama.cpp puts {SPACE} after control tokens too, not only at the beginning of a text.")
    if spaces.prefix and USER_DEFINED in types:
        notes.append(f"llama.cpp puts {SPACE} after the vocabulary's own symbols too, where sentencepiece does not.")
    return Vocabulary(
        "llama", "default", shown, types, scores=scores, flags={"add_space_prefix": spaces.prefix}, notes=notes
    )


def read_spaces(state: dict[str, Any], pieces: set[str]) -> Spaces:
    """How normalizer and pre_tokenizer of a tokenizer.json treat spaces.

    Raises UnsupportedError for steps that sentencepiece does not have.
    """
    normalizer, splitter = state.get("normalizer"), state.get("pre_tokenizer")
    kinds = [
        (step.get("type"), step.get("prepend"), (step.get("pattern") or {}).get("String"), step.get("content"))
        for step in flat(normalizer, "normalizers")
    ]
    user: frozenset[str] = frozenset()
    scheme = None
    understood = kinds in ([PREPEND, REPLACE], [REPLACE], [])
    for step in flat(splitter, "pretokenizers"):
        pattern = step.get("pattern") or {}
        if step["type"] == "Metaspace" and step.get("replacement") == SPACE and kinds != [PREPEND, REPLACE]:
            scheme = step.get("prepend_scheme", "always")
            understood &= not step.get("split", True) or not any(SPACE in piece[1:] for piece in pieces)
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and "Regex" in pattern:
            user = alternatives(pattern["Regex"])
            understood &= user <= pieces
        elif not (step["type"] == "Split" and pattern.get("String") == " "):  # there are no spaces left by then
            understood = False
    if not understood or (not kinds and scheme is None):
        raise UnsupportedError(
            "The tokenizer treats spaces otherwise than sentencepiece does: "
            f"normalizer {normalizer}, pre_tokenizer {splitter}."
        )
    if kinds == [PREPEND, REPLACE]:
        return Spaces(True, True, user)
    return Spaces(scheme in ("always", "first"), scheme == "always", user)


def flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre_tokenizer, sequences opened."""
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [one for part in step[inner] for one in flat(part, inner)]
    return [step]


def alternatives(expression: str) -> frozenset[str]:
    """The texts that an expression of escaped alternatives stands for (empty for an expression of another kind)."""
    parts = re.split(r"(?<!\\)\|", expression)
    texts = [re.sub(r"\\(.)", r"\1", part, flags=re.S) for part in parts]
    return (
        frozenset(texts)
        if all(re.escape(text) == part for text, part in zip(texts, parts, strict=True))
        else frozenset({""})
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
    listed = set(merges)
    for text, number in ids.items():
        if types[number] == NORMAL and len(text) > 1:
            cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
            if any(left in ids and right in ids and f"{left} {right}" not in listed for left, right in cuts):
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
