"""loss_on, weights, reasoning, length: which tokens carry loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlxlora.data import SamplesConfig, from_rows, load
from mlxlora.data.chat import ChatEncoder
from mlxlora.data.formats import read_messages
from mlxlora.data.spans import TurnFinder, Unusable
from mlxlora.data.template import ChatTemplate
from mlxlora.errors import ConfigError, DataError, UnsupportedError
from mlxlora.tokenizer import Tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
    {"role": "assistant", "content": "five"},
]


def learned(tokenizer: Tokenizer, rows: list, **options: Any) -> str:
    sample = from_rows(rows, tokenizer, SamplesConfig(**options))[0]
    return tokenizer.decode(sample.tokens[sample.weights > 0])


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", "two<|im_end|>four<|im_end|>five<|im_end|>"),
        ("completion", "four<|im_end|>five<|im_end|>"),
        ("last", "five<|im_end|>"),
    ],
)
def test_loss_on(tokenizer: Tokenizer, loss_on: str, expected: str) -> None:
    assert learned(tokenizer, [TALK], loss_on=loss_on) == expected


def test_loss_on_all_is_everything_but_the_first_token(tokenizer: Tokenizer) -> None:
    sample = from_rows([TALK], tokenizer, SamplesConfig(loss_on="all"))[0]
    assert sample.weights[0] == 0 and (sample.weights[1:] == 1).all()


def test_weights_of_messages(tokenizer: Tokenizer) -> None:
    talk: list[dict[str, Any]] = [dict(message) for message in TALK]
    talk[2]["train"] = False
    talk[4]["weight"] = 0.25
    sample = from_rows([talk], tokenizer)[0]
    assert tokenizer.decode(sample.tokens[sample.weights == 0.25]) == "four<|im_end|>"
    assert tokenizer.decode(sample.tokens[sample.weights == 1]) == "five<|im_end|>"


def test_reasoning(tokenizer: Tokenizer) -> None:
    rows = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nyes"}]]
    assert learned(tokenizer, rows) == "<think>\nwhy\n</think>\n\nyes<|im_end|>"
    assert learned(tokenizer, rows, thinking="mask") == "yes<|im_end|>"
    masked = from_rows(rows, tokenizer, SamplesConfig(thinking="mask"))[0]
    assert "<think>\nwhy" in tokenizer.decode(masked.tokens)
    stripped = from_rows(rows, tokenizer, SamplesConfig(thinking="strip"))[0]
    assert "think" not in tokenizer.decode(stripped.tokens)
    field = [[rows[0][0], {"role": "assistant", "content": "yes", "reasoning_content": "why"}]]
    assert learned(tokenizer, field) == "<think>\nwhy\n</think>\n\nyes<|im_end|>"
    assert learned(tokenizer, field, thinking="mask", loss_on="all").count("why") == 0


@pytest.mark.parametrize("family", ["qwen3", "harmony"])
def test_masked_reasoning_of_real_templates(family: str) -> None:
    from tests.chat_families import MARKED, hf_tokenizer

    tokenizer = Tokenizer(hf_tokenizer("bytes", None, MARKED[family][1]))
    rows = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes", "reasoning_content": "why"}]]
    end = {"qwen3": "yes<|im_end|>", "harmony": "<|channel|>final<|message|>yes<|return|>"}[family]
    assert learned(tokenizer, rows, template=family, thinking="mask") == end
    begin = {
        "qwen3": "<think>\nwhy\n</think>\n\n",
        "harmony": "<|channel|>analysis<|message|>why<|end|><|start|>assistant",
    }[family]
    assert learned(tokenizer, rows, template=family) == begin + end


OTHERS = {
    "preference": ({"prompt": "which?", "chosen": "this", "rejected": "that"}, "a chosen and a rejected ending"),
    "kto": ({"prompt": "which?", "completion": "this", "label": True}, r"a label \(KTO\)"),
    "answer": ({"prompt": "which?", "answer": "this"}, "an answer"),
    "answer to messages": ({"prompt": [{"role": "user", "content": "which?"}], "answer": "this"}, "an answer"),
}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_rows_for_other_objectives(tokenizer: Tokenizer, kind: str) -> None:
    row, what = OTHERS[kind]
    with pytest.raises(UnsupportedError, match=rf"row:2: rows with {what} .* --samples\.preference chosen"):
        from_rows([TALK, row], tokenizer)
    assert learned(tokenizer, [row], preference="chosen") == "this<|im_end|>"


def test_bad_endings_are_counted_and_left_out(tokenizer: Tokenizer, tmp_path) -> None:
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 3 == 0} for i in range(9)]
    config = SamplesConfig(preference="chosen", validation_split=0)
    splits = load(rows, tokenizer, config)
    assert [tokenizer.decode(s.tokens[s.weights > 0]) for s in splits.train] == [f"a{i}<|im_end|>" for i in (0, 3, 6)]
    assert splits.counts["train"].rejected == 6 and splits.train.unmasked == 0
    with pytest.raises(DataError, match="every row is labelled as bad"):
        load(rows[1:3], tokenizer, config)


# -- odd templates ----------------------------------------------------------------------------------------------------

CONTROL = ["<u>", "<a>", "</e>"]


def turns(source: str, messages: list[dict]) -> list[str]:
    found = TurnFinder(ChatTemplate(source), CONTROL, "</e>").find(read_messages({"messages": messages}))
    return [found.text[turn.start : turn.end] for turn in found.turns]


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_template_that_trims() -> None:
    source = "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content|trim }}</e>{% endfor %}"
    assert turns(source, talk("a", "  b \n", "b", "\nb")) == ["b</e>", "b</e>"]


def test_a_template_that_repeats_the_answer_in_another_message() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{% if not loop.first %}You said: "
        "{{ messages[loop.index0 - 1].content }}. {% endif %}{{ m.content }}</e>{% else %}<a>{{ m.content }}</e>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    assert turns(source, talk("x", "same", "y", "same")) == ["same</e>", "same</e>"]


def test_a_template_that_repeats_without_saying_where_is_refused() -> None:
    source = "{% for m in messages %}{{ m.content }}</e>{{ m.content }}</e>{% endfor %}"
    with pytest.raises(Unusable, match="repeats the answer"):
        turns(source, talk("x", "y"))


def test_a_template_that_leaves_the_answer_out() -> None:
    source = "{% for m in messages if m.role == 'user' %}<u>{{ m.content }}</e>{% endfor %}"
    with pytest.raises(Unusable, match="leaves the answer out"):
        turns(source, talk("x", "y"))


def test_a_template_that_changes_the_answer_depending_on_what_it_says() -> None:
    source = "{% for m in messages %}<a>{{ m.content | upper if m.content|length == 3 else m.content }}</e>{% endfor %}"
    assert turns(source, talk("x", "four")) == ["four</e>"]
    with pytest.raises(Unusable, match="depending on what it says"):
        turns(source, talk("x", "abc"))


def test_a_template_that_writes_the_newest_message_first() -> None:
    source = (
        "{% for m in messages | reverse %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}</e>{% endfor %}"
    )
    assert turns(source, talk("x", "y", "z", "w")) == ["y</e>", "w</e>"]


def test_unlocatable_rows_are_counted_listed_and_left_out(tokenizer: Tokenizer, tmp_path) -> None:
    template = tmp_path / "odd.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content != 'hidden' %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}"
    )
    rows = [talk("x", "hidden" if i == 7 else f"answer {i}") for i in range(200)]
    data = from_rows(rows, tokenizer, SamplesConfig(template=str(template)))
    assert data.samples == 199 and data.unmasked == 1
    assert "row:8" not in [sample.origin for sample in data]
    rows = [talk("x", "hidden" if i < 2 else "y") for i in range(20)]
    with pytest.raises(DataError, match=r"2 of 20 samples.*nothing to learn from"):
        from_rows(rows, tokenizer, SamplesConfig(template=str(template)))
    allowed = SamplesConfig(template=str(template), allow_unusable=True)
    assert from_rows(rows, tokenizer, allowed).unmasked == 2


def test_end_turns(tokenizer: Tokenizer, tmp_path) -> None:
    template = tmp_path / "open.jinja"
    template.write_text("{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}")
    rows = [talk("x", "yes")]
    assert learned(tokenizer, rows, template=str(template)) == "yes"
    assert learned(tokenizer, rows, template=str(template), end_turns=True) == "yes<|im_end|>"


def test_an_answer_that_spells_private_use_characters(tokenizer: Tokenizer) -> None:
    assert learned(tokenizer, [talk("x", "\U000f0001 and \U000f0000")]) == "\U000f0001 and \U000f0000<|im_end|>"


def test_the_date_is_fixed() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}")
    assert template.render([]) == "26 Jul 2024"


# -- length -----------------------------------------------------------------------------------------------------------


def test_too_long(tokenizer: Tokenizer) -> None:
    rows = [talk("word " * 200, "the answer"), talk("hi", "word " * 300), talk("hi", "short")]
    cut = from_rows(rows, tokenizer, SamplesConfig(max_length=64))
    assert cut.lengths.tolist()[:2] == [64, 64] and (cut.trained > 0).all()
    assert tokenizer.decode(cut[0].tokens[cut[0].weights > 0]) == "the answer<|im_end|>"
    assert cut[1].weights[-1] == 1  # the end of a long answer goes, its beginning stays
    kept = from_rows(rows, tokenizer, SamplesConfig(max_length=64, too_long="drop"))
    assert kept.samples == 1


@pytest.mark.parametrize("extra", range(0, 40, 3))
def test_truncation_always_leaves_something_to_learn(tokenizer: Tokenizer, extra: int) -> None:
    rows = [talk("hm " * extra, "yes " * 30, "ok " * extra, "no " * 40)]
    data = from_rows(rows, tokenizer, SamplesConfig(max_length=32))
    assert data.lengths[0] <= 32 and data.trained[0] > 0


def test_wrong_options_name_field_and_value() -> None:
    for options, field in (
        ({"max_length": 2}, "max_length is 2"),
        ({"validation_split": 1.5}, "validation_split is 1.5"),
        ({"window": 5000}, "window is 5000"),
        ({"stride": 0}, "stride is 0"),
        ({"date": "tomorrow"}, "date is 'tomorrow'"),
        ({"columns": {"promt": "x"}}, "Did you mean 'prompt'"),
        ({"fill": True, "stride": 4}, "contradict"),
    ):
        with pytest.raises(ConfigError, match=field):
            SamplesConfig(**options)


def test_offsets_and_weights_hold_on_many_texts(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(0)
    letters = list("ab \n\t.é🙂東<>|{}")
    config = SamplesConfig()
    encoder = ChatEncoder(tokenizer, ChatTemplate(str(tokenizer.chat_template)), config)
    said = ["".join(random.choice(letters, random.integers(1, 12))) + "x" for _ in range(400)]
    rows = [talk(*said[index : index + 4]) for index in range(0, 400, 4)]
    for messages, item in zip(rows, encoder.encode([read_messages({"messages": row}) for row in rows]), strict=True):
        assert item.sample is not None
        assert tokenizer.decode(item.sample.tokens[item.sample.weights > 0]) == "".join(
            message["content"] + "<|im_end|>" for message in messages[1::2]
        )
