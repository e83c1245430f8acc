"""Data sets made in Python: lists, generators, raw text, with the counts that LM-Kit shows."""

from __future__ import annotations

import pytest

from mlxlora.data import Conversation, Message, SamplesConfig, TextRun, from_rows, load
from mlxlora.errors import DataError
from mlxlora.tokenizer import Tokenizer

ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Hello"}


def test_lists_generators_and_records_are_the_same(tokenizer: Tokenizer) -> None:
    rows = [
        {"messages": [ASKED, SAID]}, [ASKED, SAID], (ASKED, SAID),
        [Message("user", "Hi"), Message("assistant", "Hello")],
        Conversation([Message("user", "Hi"), Message("assistant", "Hello")]),
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ]  # fmt: skip
    for row in rows:
        assert from_rows([row], tokenizer).fingerprint == from_rows([rows[0]], tokenizer).fingerprint
    made = from_rows(([ASKED, SAID] for _ in range(3000)), tokenizer)
    assert made.samples == len(made) == 3000


def test_counts(tokenizer: Tokenizer) -> None:
    data = from_rows([[ASKED, SAID], [ASKED, {"role": "assistant", "content": "Hello " * 20}]], tokenizer)
    assert data.samples == 2 and data.unmasked == 0
    assert data.shortest == len(data[0].tokens) and data.longest == len(data[1].tokens)
    assert data[-1].origin == "row:2" and [sample.origin for sample in data] == ["row:1", "row:2"]
    with pytest.raises(IndexError):
        data[2]
    assert data.subset([1]).shortest == data.longest


def test_raw_text_turns(tokenizer: Tokenizer) -> None:
    prompt = TextRun("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", train=False)
    answer = TextRun("Hello<|im_end|>")
    raw = from_rows([[prompt, answer]], tokenizer)[0]
    chat = from_rows([[ASKED, SAID]], tokenizer)[0]
    assert raw.tokens.tolist() == chat.tokens.tolist()[: len(raw.tokens)]
    assert raw.weights.tolist() == chat.weights.tolist()[: len(raw.tokens)]
    assert from_rows([TextRun("all of it"), "a text"], tokenizer).samples == 2


def test_several_conversations_in_one_history(tokenizer: Tokenizer) -> None:
    whole = from_rows([[ASKED, SAID, TextRun("\n---\n", train=False), ASKED, SAID]], tokenizer)[0]
    one = from_rows([[ASKED, SAID]], tokenizer)[0]
    said = tokenizer.decode(whole.tokens[whole.weights > 0])
    assert said == "Hello<|im_end|>" * 2
    assert whole.tokens.tolist()[: len(one.tokens)] == one.tokens.tolist()
    assert whole.tokens.tolist()[-len(one.tokens) :] == one.tokens.tolist()


def test_wrong_rows_are_named_by_their_number(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError) as caught:
        from_rows([[ASKED, SAID], 7, [], [{"role": "elf", "content": "x"}], {"x": 1}, {"text": 3}], tokenizer)
    assert [problem.where for problem in caught.value.problems] == ["row:2", "row:3", "row:4", "row:5", "row:6"]


def test_load_takes_rows_too(tokenizer: Tokenizer) -> None:
    rows = [[{"role": "user", "content": str(i)}, SAID] for i in range(40)]
    splits = load(rows, tokenizer, SamplesConfig(validation_split=0.1))
    assert len(splits.train) == 36 and splits.valid is not None and len(splits.valid) == 4
    with pytest.raises(DataError, match="no rows"):
        load([], tokenizer)
