"""A tokenizer as GGUF's vocabulary: tokens with their types, merges or scores, special ids, chat template.

Two kinds of vocabulary exist on both sides. Byte-level BPE (`gpt2` in GGUF: merges, and a pre-tokenizer by name), and
sentencepiece's (`llama` in GGUF: a score for each token, pieces with ▁ for a space, bytes as a last resort). What is
compared and written is the tokenizer that transformers builds from the model directory, not just tokenizer.json.
"""

from __future__ import annotations

import json
from typing import Any

from mlxlora.data.template import ChatTemplate, TemplateRefusal
from mlxlora.errors import ModelError, Problem, UnsupportedError
from mlxlora.tokenizer import Tokenizer
from mlxlora_convert import gguf_pretokenizers
from mlxlora_convert.gguf_pieces import sentencepiece
from mlxlora_convert.gguf_tokens import CONTROL, NORMAL, SPECIAL, UNUSED, USER_DEFINED, Vocabulary, some

PHI3_TOKENS, PHI3_KEPT = {"</s>", "<unk>", "<s>", "<|endoftext|>"}, {"<unk>", "<s>", "<|endoftext|>"}


def vocabulary(hf: Any, size: int) -> Vocabulary:
    """The vocabulary of a transformers tokenizer for a model with `size` rows of embeddings.

    Raises UnsupportedError for tokenizers that llama.cpp has no counterpart of, ModelError for ids without embedding.
    """
    backend = hf.backend_tokenizer
    state = json.loads(backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(
            f"The model's tokenizer is of type {model.get('type')}. As GGUF only BPE vocabularies are written: of "
            "bytes, as Qwen's and Llama 3's, and sentencepiece's, as Mistral's and Gemma's. This one "
            "llama.cpp would not cut into the tokens that the model knows. Other ways out: --to mlx, --to hf, or "
            "--to lmstudio, which takes an MLX model."
        )
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
    if known.differs:
        notes.append(f"llama.cpp cuts {known.differs} otherwise than this tokenizer.")
    return Vocabulary("gpt2", known.names[0], tokens, types, merges=merges, notes=notes)


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
    tokenizer = Tokenizer(hf)
    found.templates = tokenizer.chat_templates
    turn_end = end_of_turn(tokenizer)
    if turn_end is not None and turn_end != eos:
        found.ids["eot_token_id"] = turn_end


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The control token that the chat template puts after an answer, found by rendering one; None without one."""
    source, controls = tokenizer.chat_template, tokenizer.control_pattern
    if source is None or controls is None:
        return None
    answer = "Say1a"
    messages = [{"role": "user", "content": "Ask1q"}, {"role": "assistant", "content": answer}]
    try:
        text = ChatTemplate(source, tokenizer.special_variables).render(messages)
    except (TemplateRefusal, ModelError):
        return None
    mark = controls.search(text.rpartition(answer)[2]) if answer in text else None
    return tokenizer.control_tokens[mark[0]] if mark else None
