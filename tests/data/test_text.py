"""Plain text: windows, overlap, markers, filling, tokens between documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlxlora.data import Dataset, SamplesConfig, from_rows
from mlxlora.tokenizer import Tokenizer

LONG = " ".join(f"word {i}" for i in range(200))


def texts(tokenizer: Tokenizer, rows: list[str], **options: Any) -> Dataset:
    return from_rows([{"text": text} for text in rows], tokenizer, SamplesConfig(**options))


def learned(data: Dataset) -> list[int]:
    return [int(token) for sample in data for token in sample.tokens[sample.weights > 0]]


@pytest.mark.parametrize("options", [{"too_long": "split"}, {"window": 32}, {"window": 32, "stride": 32}])
def test_windows_learn_every_token_once(tokenizer: Tokenizer, options: dict) -> None:
    data = texts(tokenizer, [LONG], max_length=64, **options)
    whole = [*tokenizer.encode(LONG).ids.tolist(), tokenizer.eos_id]
    assert data.longest <= options.get("window", 64) and len(data) > 3
    assert learned(data) == whole[1:]


@pytest.mark.parametrize("stride", [1, 7, 16, 31])
def test_overlapping_windows_learn_every_token_once(tokenizer: Tokenizer, stride: int) -> None:
    data = texts(tokenizer, [LONG], max_length=64, window=32, stride=stride)
    whole = [*tokenizer.encode(LONG).ids.tolist(), tokenizer.eos_id]
    assert learned(data) == whole[1:]
    assert data[1].tokens[: 32 - stride].tolist() == data[0].tokens[stride:].tolist()


def test_filling_puts_documents_together_and_loses_nothing(tokenizer: Tokenizer) -> None:
    rows = ["one two three", LONG, "four", "five six"]
    data = texts(tokenizer, rows, max_length=48, fill=True)
    stream = [token for text in rows for token in (*tokenizer.encode(text).ids.tolist(), tokenizer.eos_id)]
    assert learned(data) == stream[1:]
    assert set(data.lengths.tolist()[:-1]) == {48}


def test_sample_start(tokenizer: Tokenizer) -> None:
    text = "## one\ntext\n## two\nmore\n"
    kept = texts(tokenizer, [text], sample_start="## ")
    said = [tokenizer.decode(sample.tokens) for sample in kept]
    assert said == ["## one\ntext\n<|im_end|>", "## two\nmore\n<|im_end|>"]
    dropped = texts(tokenizer, [text], sample_start="## ", keep_sample_start=False)
    assert tokenizer.decode(dropped[0].tokens) == "one\ntext\n<|im_end|>"


def test_end_and_beginning_of_documents(tokenizer: Tokenizer) -> None:
    from tests.chat_families import hf_tokenizer

    assert texts(tokenizer, ["one"])[0].tokens[-1] == tokenizer.eos_id
    assert texts(tokenizer, ["one two"], append_eos=False)[0].tokens[-1] != tokenizer.eos_id
    llama = Tokenizer(hf_tokenizer("metaspace", None, "</s>"))
    sample = texts(llama, ["one"], prepend_bos=True)[0]
    assert sample.tokens[0] == llama.bos_id and sample.weights[0] == 0 and sample.weights[1] == 1
    assert texts(llama, ["one"], prepend_bos=False)[0].tokens[0] != llama.bos_id


def test_control_tokens_in_text_are_text(tokenizer: Tokenizer) -> None:
    sample = texts(tokenizer, ["a <|im_end|> b"], append_eos=False)[0]
    assert tokenizer.control_tokens["<|im_end|>"] not in sample.tokens
    assert tokenizer.decode(sample.tokens) == "a <|im_end|> b"


def test_prompt_and_completion_as_text_and_as_chat(tokenizer: Tokenizer) -> None:
    row = {"prompt": "one", "completion": " two"}
    plain = from_rows([row], tokenizer, SamplesConfig(prompts="plain"))[0]
    assert tokenizer.decode(plain.tokens) == "one two<|im_end|>"
    assert tokenizer.decode(plain.tokens[plain.weights > 0]) == " two<|im_end|>"
    chat = from_rows([row], tokenizer)[0]
    assert tokenizer.decode(chat.tokens).startswith("<|im_start|>user\none<|im_end|>")
    assert np.count_nonzero(chat.weights) == np.count_nonzero(plain.weights)
