"""The tokenizer against transformers' own encoding."""
# ruff: noqa: E501

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlxlora.errors import ModelError, UnsupportedError
from mlxlora.tokenizer import Tokenizer
from tests import tiny
from tests.chat_families import CONTROL, hf_tokenizer

TEXTS = [
    "Hello world", "", " ", "  two  spaces ", "\n\nlines\n", "東京 🙂 é́", "<|im_start|>user\nHi<|im_end|>", "a</s>b", "x" * 500,
    "<|im_start|>\n <think> why </think>\n</s>", "[INST] a [/INST]", "\u200b\ufeffzero", "tab\tnbsp\u00a0",
]  # fmt: skip


@pytest.fixture(scope="module", params=["bytes", "metaspace", "prepend"])
def made(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(hf_tokenizer(request.param, None, "</s>"))


def test_ids_are_those_of_transformers(made: Tokenizer) -> None:
    for text, encoding in zip(TEXTS, made.encode_batch(TEXTS), strict=True):
        assert encoding.ids.tolist() == made.hf(text, add_special_tokens=False)["input_ids"]
        assert made.encode_ids([text], control=True)[0].tolist() == encoding.ids.tolist()


def test_state_left_by_transformers_does_not_matter(made: Tokenizer) -> None:
    before = made.fingerprint
    made.hf(["a", "a b c d e f"], truncation=True, max_length=3)
    assert len(made.encode("a b c d e f g h").ids) > 3
    again = Tokenizer(made.hf)
    assert again.fingerprint == before and len(again.encode("a b c d e f g h").ids) > 3


def test_offsets_cover_the_text(made: Tokenizer) -> None:
    for text in TEXTS:
        encoding = made.encode(text)
        covered = np.zeros(len(text), bool)
        for start, end in zip(encoding.starts, encoding.ends, strict=True):
            covered[start:end] = True
        assert covered.all(), text


def test_aliases_are_the_control_tokens_and_their_spelling_is_text(made: Tokenizer) -> None:
    assert made.control_pattern is not None
    for text in TEXTS:
        aliased = made.control_pattern.sub(lambda found: made.alias(found.group()), text)
        assert made.encode_aliased([aliased])[0].ids.tolist() == made.encode(text).ids.tolist()
    control = set(made.control_tokens.values())
    for token in CONTROL:
        ids = made.encode_ids([f"a {token} b"])[0]
        assert not control & set(ids.tolist()), token
        said = made.decode(ids).strip().replace("▁", " ")  # to sentencepiece ▁ is a space
        assert said == f"a {token} b".replace("▁", " ")


def test_plain_encoding_agrees_with_split_special_tokens(made: Tokenizer) -> None:
    for text in TEXTS:
        expected = made.hf(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert made.encode_ids([text])[0].tolist() == expected


def test_fingerprints_tell_tokenizers_apart() -> None:
    kinds = [Tokenizer(hf_tokenizer(kind, None, eos)) for kind in ("bytes", "metaspace") for eos in ("</s>", "<eos>")]
    assert len({tokenizer.fingerprint for tokenizer in kinds}) == 4


def test_what_cannot_be_loaded(tmp_path) -> None:
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UnsupportedError, match="not a fast tokenizer"):
        Tokenizer(object())


def test_unigram_vocabularies_hold_their_control_tokens_as_pieces_and_still_spell_them_as_text() -> None:
    """Here `split_special_tokens` of transformers finds `</s>` as a piece of the vocabulary: ours must not."""
    made = Tokenizer(hf_tokenizer("unigram", None, "</s>"))
    assert made.control_pattern is not None
    for text in TEXTS:
        aliased = made.control_pattern.sub(lambda found: made.alias(found.group()), text)
        assert made.encode_aliased([aliased])[0].ids.tolist() == made.encode(text).ids.tolist()
    control = set(made.control_tokens.values()) - {made.control_tokens["<unk>"]}  # which any unknown letter is
    for token in CONTROL:
        assert control & set(made.encode_ids([f"a {token} b"], control=True)[0].tolist()) or token == "<unk>"
        assert not control & set(made.encode_ids([f"a {token} b"])[0].tolist()), token


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2"])
def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, family: str) -> None:
    model = tiny.model_directory(tmp_path / "model", family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    with pytest.raises(ModelError, match=r"no vocabulary.*needs tokenizer\.json"):  # transformers makes an empty one
        Tokenizer.load(model)
