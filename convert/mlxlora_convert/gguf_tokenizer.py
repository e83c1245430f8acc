"""The vocabulary of a GGUF file as a tokenizer directory: tokenizer.json, its settings, and the chat template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora.errors import FormatError, Problem, UnsupportedError
from mlxlora.files import write_json
from mlxlora_convert import gguf_pretokenizers
from mlxlora_convert.gguf_header import GGUFHeader
from mlxlora_convert.gguf_tokens import CONTROL, SPACE, SPECIAL, UNKNOWN, UNUSED, USER_DEFINED

PREFIX = "tokenizer.ggml"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def write_tokenizer(header: GGUFHeader, directory: Path, config: dict[str, Any]) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json. Returns what a person should know.

    Raises FormatError for a vocabulary that contradicts itself, UnsupportedError for a kind that cannot be rebuilt.
    """
    tokens, types, scores = read_tokens(header)
    kind = header.metadata.get(f"{PREFIX}.model")
    if kind == "gpt2":
        state = byte_level(header, tokens, types)
    elif kind == "llama":
        state = sentencepiece(header, tokens, types, scores)
    else:
        raise UnsupportedError(
            f"{header.path}: a vocabulary of kind '{kind}' cannot be rebuilt yet. Known: gpt2, llama."
        )
    ids = special_ids(header, len(tokens))
    state["added_tokens"] = added_tokens(tokens, types, cut_out=kind == "llama")
    state["post_processor"] = post_processor(header, kind, tokens, ids)
    write_json(directory / "tokenizer.json", {"version": "1.0", "truncation": None, "padding": None, **state})
    write_json(directory / "tokenizer_config.json", settings(header, tokens, ids, config))
    ends = [ids[name] for name in ("eos_token_id", "eot_token_id", "eom_token_id") if name in ids]
    if ends:
        unique = list(dict.fromkeys(ends))
        write_json(directory / "generation_config.json", {"eos_token_id": unique if len(unique) > 1 else unique[0]})
    return [] if templates(header) else ["The file has no chat template."]


def read_tokens(header: GGUFHeader) -> tuple[list[str], list[int], list[float] | None]:
    """Texts, types and scores by id. Raises FormatError when they are missing or of different lengths."""
    tokens = header.metadata.get(f"{PREFIX}.tokens")
    types = header.metadata.get(f"{PREFIX}.token_type")
    scores = header.metadata.get(f"{PREFIX}.scores")
    problems = []
    if not isinstance(tokens, list) or not tokens or not all(isinstance(text, str) for text in tokens):
        raise FormatError.of(f"{header.path}: vocabulary", [Problem(f"{PREFIX}.tokens", "no list of strings")])
    for name, values in (("token_type", types), ("scores", scores)):
        if values is not None and (not isinstance(values, np.ndarray) or len(values) != len(tokens)):
            problems.append(Problem(f"{PREFIX}.{name}", f"not {len(tokens)} numbers, one a token"))
    seen: set[str] = set()
    twice = [text for text in tokens if text in seen or seen.add(text)]  # type: ignore[func-returns-value]
    if twice:
        problems.append(Problem(f"{PREFIX}.tokens", f"{twice[0]!r} stands there twice"))
    if problems:
        raise FormatError.of(f"{header.path}: vocabulary", problems)
    return tokens, [1] * len(tokens) if types is None else types.tolist(), None if scores is None else scores.tolist()


def added_tokens(tokens: list[str], types: list[int], *, cut_out: bool) -> list[dict[str, Any]]:
    """tokenizer.json's `added_tokens`: control tokens, and the makers' own unless they are `cut_out` by a splitter."""
    wanted = (CONTROL, UNKNOWN) if cut_out else (CONTROL, UNKNOWN, USER_DEFINED)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": text, **plain, "special": types[number] != USER_DEFINED}
        for number, text in enumerate(tokens)
        if types[number] in wanted
    ]


def byte_level(header: GGUFHeader, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """tokenizer.json of byte-level BPE."""
    known = gguf_pretokenizers.by_name(str(header.metadata.get(f"{PREFIX}.pre", "gpt-2")))
    merges = header.metadata.get(f"{PREFIX}.merges")
    vocabulary = {text: number for number, text in enumerate(tokens) if types[number] != UNUSED}
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise FormatError.of(f"{header.path}: vocabulary", [Problem(f"{PREFIX}.merges", "no list of strings")])
    pairs = [merge.split(" ") for merge in merges]
    wrong = [
        merge
        for merge, pair in zip(merges, pairs, strict=True)
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys()
    ]
    if wrong:
        problems = [Problem(f"{PREFIX}.merges", f"{merge!r} is no pair of tokens that make a token") for merge in wrong]
        raise FormatError.of(f"{header.path}: vocabulary", problems)
    return {
        "normalizer": {"type": known.normalizer} if known.normalizer else None,
        "pre_tokenizer": gguf_pretokenizers.tokenizer_json(known),
        "decoder": BYTE_LEVEL,
        "model": bpe(vocabulary, pairs, ignore_merges=known.ignore_merges),
    }


def bpe(vocabulary: dict[str, int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    """tokenizer.json's `model`."""
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **plain, **flags, **settings, "vocab": vocabulary, "merges": merges}


def sentencepiece(
    header: GGUFHeader, tokens: list[str], types: list[int], scores: list[float] | None
) -> dict[str, Any]:
    """tokenizer.json of a sentencepiece vocabulary: its scores as an order of merges."""
    if scores is None:
        raise FormatError.of(f"{header.path}: vocabulary", [Problem(f"{PREFIX}.scores", "missing")])
    # pieces that the model's makers reserved are cut out of a text after its spaces have become ▁
    tokens = [text.replace(" ", SPACE) if types[n] == USER_DEFINED else text for n, text in enumerate(tokens)]
    own = sorted((text for n, text in enumerate(tokens) if types[n] == USER_DEFINED), key=len, reverse=True)
    pattern = {"Regex": "|".join(map(re.escape, own))}
    vocabulary = {text: number for number, text in enumerate(tokens) if types[number] != UNUSED}
    unknown = next((text for number, text in enumerate(tokens) if types[number] == UNKNOWN), None)
    prefix = header.metadata.get(f"{PREFIX}.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    merges = merges_from_scores(tokens, types, scores)
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        if own
        else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True, ignore_merges=bool(own)),
    }


def merges_from_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Every way to make a token of two others, tokens of the highest score first: sentencepiece's order of merging."""
    ids = {text: number for number, text in enumerate(tokens) if types[number] not in (UNUSED, CONTROL, USER_DEFINED)}
    makers = [number for number in ids.values() if types[number] == 1 and len(tokens[number]) > 1]
    makers.sort(key=lambda number: (-scores[number], number))
    merges = []
    for number in makers:
        text = tokens[number]
        cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text)) if text[:cut] in ids and text[cut:] in ids]
        merges += [[left, right] for left, right in sorted(cuts, key=lambda cut: (ids[cut[0]], ids[cut[1]]))]
    return merges


def special_ids(header: GGUFHeader, size: int) -> dict[str, int]:
    """The ids of special tokens by GGUF's names. Raises FormatError for ids outside of the vocabulary."""
    names = [ours for _, ours in SPECIAL] + ["eot_token_id", "eom_token_id"]
    ids, problems = {}, []
    for name in names:
        value = header.metadata.get(f"{PREFIX}.{name}")
        if value is None or value == 0xFFFFFFFF:  # llama.cpp's "none"
            continue
        if not isinstance(value, int) or not 0 <= value < size:
            problems.append(Problem(f"{PREFIX}.{name}", f"found {value!r}, expected an id below {size}"))
        else:
            ids[name] = value
    if problems:
        raise FormatError.of(f"{header.path}: vocabulary", problems)
    return ids


def post_processor(header: GGUFHeader, kind: str, tokens: list[str], ids: dict[str, int]) -> dict[str, Any] | None:
    """tokenizer.json's `post_processor`: BOS before and EOS after a text where llama.cpp adds them."""
    pre = header.metadata.get(f"{PREFIX}.pre")
    usual = kind == "llama" or pre in ("llama-bpe", "llama3", "llama-v3", "tekken")
    bos = ids.get("bos_token_id") if header.metadata.get(f"{PREFIX}.add_bos_token", usual) else None
    eos = ids.get("eos_token_id") if header.metadata.get(f"{PREFIX}.add_eos_token", False) else None
    if bos is None and eos is None:
        return {"type": "ByteLevel", **{k: v for k, v in BYTE_LEVEL.items() if k != "type"}} if kind == "gpt2" else None

    def special(number: int | None, place: int) -> list[dict[str, Any]]:
        return [] if number is None else [{"SpecialToken": {"id": tokens[number], "type_id": place}}]

    def sequence(name: str, place: int) -> list[dict[str, Any]]:
        return [*special(bos, place), {"Sequence": {"id": name, "type_id": place}}, *special(eos, place)]

    used = [number for number in (bos, eos) if number is not None]
    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {tokens[n]: {"id": tokens[n], "ids": [n], "tokens": [tokens[n]]} for n in used},
    }


def templates(header: GGUFHeader) -> dict[str, str]:
    """The chat templates of a file by name."""
    found = {}
    if isinstance(text := header.metadata.get("tokenizer.chat_template"), str):
        found["default"] = text
    for key, text in header.metadata.items():
        if key.startswith("tokenizer.chat_template.") and isinstance(text, str):
            found[key.removeprefix("tokenizer.chat_template.")] = text
    return found


def settings(header: GGUFHeader, tokens: list[str], ids: dict[str, int], config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json."""
    found: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    for theirs, ours in SPECIAL:
        if ours in ids:
            found[theirs.removesuffix("_id")] = tokens[ids[ours]]
    named = templates(header)
    if len(named) == 1:
        found["chat_template"] = next(iter(named.values()))
    elif named:
        found["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    return found
