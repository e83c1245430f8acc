"""A model is asked in the words that it was trained on, and nobody can slip control tokens into them."""

from __future__ import annotations

import datetime
from types import SimpleNamespace

import pytest

from mlxlora.data import SamplesConfig, from_rows
from mlxlora.errors import DataError
from mlxlora.prompts import ChatPrompts, sample_prompt
from mlxlora.tokenizer import ALIAS_CLOSE, ALIAS_OPEN, Tokenizer
from tests.chat_families import MARKED, hf_tokenizer

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
TALK = [
    {"role": "user", "content": " What is <|im_end|>?  "}, {"role": "assistant", "content": "A token. "},
    {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": " </s>?"}]},
    {"role": "assistant", "content": "Another."},
]  # fmt: skip
WITH_TOOLS = [
    {"role": "user", "content": "Is it warm?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "20"}, {"role": "assistant", "content": "Yes."},
]  # fmt: skip


class Day(datetime.date):
    """Days of which none ends while something is compared."""

    @classmethod
    def today(cls) -> Day:
        return cls(2026, 1, 31)


def tokenizer_of(family: str) -> Tokenizer:
    return Tokenizer(hf_tokenizer("bytes", None, MARKED[family][1]))


FAMILIES = ["chatml", "llama3", "gemma", "mistral", "phi3", "zephyr", "qwen3", "harmony"]
KNOW_TOOLS = ["qwen3", "harmony"]


@pytest.mark.parametrize(
    ("family", "talk", "tools"),
    [(family, TALK, None) for family in FAMILIES] + [(family, WITH_TOOLS, TOOLS) for family in KNOW_TOOLS],
)
def test_the_prompt_is_what_training_saw_before_the_answer(
    family: str, talk: list, tools: list | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(family)
    monkeypatch.setattr("mlxlora.prompts.datetime", SimpleNamespace(date=Day))
    config = SamplesConfig(template=family, loss_on="last", date=Day.today().isoformat())
    sample = from_rows([{"messages": talk, "tools": tools}], tokenizer, config)[0]
    first = int((sample.weights > 0).argmax())
    prompt = ChatPrompts(tokenizer, template=family)(talk[:-1], tools=tools)
    # a pre-tokenizer may split the white space before an answer otherwise than at the end of a text
    seen = [prompt.text, tokenizer.decode(prompt.tokens), tokenizer.decode(sample.tokens[:first])]
    assert len({"".join(text.split()) for text in seen}) == 1
    assert int(sample.tokens[sample.weights > 0][-1]) in (*prompt.stops, tokenizer.eos_id)
    whole = ChatPrompts(tokenizer, template=family)(talk, tools=tools, add_generation_prompt=False)
    assert whole.tokens == sample.tokens.tolist()


@pytest.mark.parametrize("family", ["chatml", "gemma", "zephyr", "phi3", "mistral"])
def test_a_sample_s_prompt_is_shown_as_what_was_said(family: str) -> None:
    tokenizer, config = tokenizer_of(family), SamplesConfig(template=family)
    said = ["Who is\nit?", "I.", "And?", "You."]
    talk = [{"role": "user" if turn % 2 == 0 else "assistant", "content": text} for turn, text in enumerate(said)]
    one, two = (sample_prompt(tokenizer, from_rows([talk[:end]], tokenizer, config)[0]) for end in (2, 4))
    assert (one[0].text, one[1]) == ("Who is\nit?", "I.")
    roles = {"mistral": ("", ""), "gemma": ("user: ", "model: ")}.get(family, ("user: ", "assistant: "))
    assert two[0].text == f"{roles[0]}Who is\nit?\n{roles[1]}I.\n{roles[0]}And?"


def test_no_text_can_spell_a_control_token() -> None:
    tokenizer = tokenizer_of("chatml")
    prompts = ChatPrompts(tokenizer, template="chatml")
    number = tokenizer.control_tokens["<|im_end|>"]
    for typed in (
        "<|im_end|>",
        f"{ALIAS_OPEN}{number}{ALIAS_CLOSE} <|im_end|>",
        f"{ALIAS_OPEN}{ALIAS_CLOSE}",
        Tokenizer(tokenizer.hf).alias("<|im_end|>"),  # another process drew another secret
    ):
        prompt = prompts([{"role": "user", "content": typed}])
        assert prompt.tokens.count(number) == 1 and typed in prompt.text
        assert number not in tokenizer.encode_ids([typed + "<|im_end|>"])[0]
    with pytest.raises(DataError, match="private-use"):
        prompts([{"role": "user", "content": "\U0010fffb6\U0010fffa"}])


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "elf", "content": "x"}, r"Messages\[0\].role is 'elf'"),
        ({"role": "user"}, r"Messages\[0\].content is missing"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "is image_url, not text"),
    ],
)
def test_wrong_messages_are_named(message: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ChatPrompts(tokenizer_of("chatml"), template="chatml")([message])


def test_variables_reach_the_template() -> None:
    prompts = ChatPrompts(tokenizer_of("qwen3"), template="qwen3")
    asked = [{"role": "user", "content": "x"}]
    assert prompts(asked, enable_thinking=False).text.endswith("<think>\n\n</think>\n\n")
    assert not prompts(asked).text.endswith("</think>\n\n")
