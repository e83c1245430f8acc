"""`mlxlora data check` and `mlxlora data convert`, as they are called."""
# ruff: noqa: E501 - rows as they stand in files

from __future__ import annotations

import json
import re
import resource
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxlora import flags
from mlxlora.cli import main
from mlxlora.data.check import DataCheck, check
from mlxlora.data.config import SamplesConfig
from mlxlora.data.show import Piece, Shown, for_terminal
from mlxlora.files import publish as publishing
from mlxlora.finetune import finetune
from mlxlora.terminal import OFF, PARTLY
from tests import tiny

Write = Callable[..., Path]


def talk(*texts: str) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


GOOD = [talk(f"What is the capital of country number {i}?", f"It is city {i * 7}.") for i in range(60)]


def kinds(found: DataCheck) -> dict[str, int]:
    return {finding.kind: finding.count for finding in found.findings}


def test_figures(jsonl: Write, model: Path) -> None:
    found = check([str(jsonl(GOOD))], model=str(model))
    assert (found.rows, found.samples, found.validation) == (60, 57, 3)
    assert found.formats == ("messages",) and found.template == "the model's own"
    assert sum(count for *_, count in found.histogram) == 57
    assert 0 < found.trained_tokens < found.tokens and found.lengths[0] <= found.lengths[1] <= found.lengths[3]
    assert found.steps == 15 and 0 <= found.padding < 0.1
    assert len(found.shown) == 3 and not kinds(found)
    pieces = found.shown[0].pieces
    assert "".join(p.text for p in pieces if p.weight).startswith("It is city") and pieces[0].text == "<|im_start|>"
    assert pieces[0].control and pieces[0].weight == 0


def test_the_next_command_trains_on_the_same_samples(jsonl: Write, model: Path) -> None:
    samples = SamplesConfig(max_length=99, packing=True, columns={"messages": "messages"}, validation_split=0.25)
    found = check([str(jsonl(GOOD))], model=str(model), samples=samples)
    words = shlex.split(str(found).splitlines()[-1].removeprefix("next: mlxlora train "))
    parser = flags.build_parser(finetune)
    assert flags.parse(parser, flags.normalise(parser, words))["samples"] == samples


def test_json_and_page(jsonl: Write, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    rows = [*GOOD, talk("show <b>me</b>", "<script>alert(1)</script> 東京 🙂")]
    words = ["data", "check", str(jsonl(rows)), "--model", str(model), "--json", "--html", str(page), "--show", "99"]
    assert main([*words, "--samples.validation_split", "0"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["samples"] == 61 and value["findings"] == []
    text = page.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "http" not in text
    assert 'class="t"' in text and "&lt;script&gt;" in re.sub("<[^>]*>", "", text)


def test_on_paper(jsonl: Write, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(jsonl(GOOD)), "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "⟦It is city" in out and "<|im_end|>⟧" in out and "mlxlora train" in out


def test_the_colour_of_a_weight_goes_on_after_a_line_break() -> None:
    half = Shown("", 1, 1, (Piece("a\nb", (1,), 0.5),))
    assert for_terminal(half, colour=True) == f"{PARTLY}a⏎{OFF}\n{PARTLY}b{OFF}"


LONG = "This answer goes on for quite a while, as answers do that explain something. " * 6
WARNED = {
    "roles": {"messages": [{"role": "user", "content": "a b c"}, {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]},
    "empty": talk("a question", "an answer", "another", " "),
    "cut": talk("explain", LONG + "and then the"),
    "secret": talk("key?", "use AKIAABCDEFGHIJKLMNOP for it"),
    "not_text": talk("look", "data:image/png;base64,iVBORw0KGgo="),
    "encoding": talk("sch\u00c3\u00b6n", "caf\u00c3\u00a9"),
    "duplicate": GOOD[3],
    "near_duplicate": talk("What is the capital of country number 3?", "It is city 21. " + "one two three four five six seven eight " * 8),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(WARNED))
def test_warnings(kind: str, jsonl: Write, model: Path) -> None:
    rows = [*GOOD, WARNED[kind]]
    if kind == "near_duplicate":
        twin = json.loads(json.dumps(WARNED[kind]))
        twin["messages"][1]["content"] += "nine"
        rows.append(twin)
    path = jsonl(rows)
    found = check([str(path)], model=str(model))
    assert kind in kinds(found), found.findings
    finding = next(finding for finding in found.findings if finding.kind == kind)
    assert finding.places == [f"{path}:{len(rows)}"] and finding.advice
    if kind == "secret":
        assert "AKIAABCDEFGHIJKLMNOP" not in str(finding)


def test_good_rows_give_no_warning_and_each_rule_fires_alone(jsonl: Write, model: Path) -> None:
    assert not kinds(check([str(jsonl(GOOD))], model=str(model)))


def test_overlap_of_train_and_validation(jsonl: Write, model: Path) -> None:
    train = jsonl(GOOD, "t.jsonl")
    same = jsonl([GOOD[5], talk("What is the capital of country number 6?", "Something else.")], "v.jsonl")
    found = check([str(train)], model=str(model), samples=SamplesConfig(validation=same))
    assert kinds(found) == {"overlap": 1, "same_prompt": 1}


def test_templates_are_looked_at(jsonl: Write, tmp_path: Path) -> None:
    def with_template(source: str, rows: list[dict]) -> dict[str, int]:
        model = tiny.tokenizer(tmp_path / "odd", template=source)
        (model / "config.json").write_text('{"model_type": "llama"}')
        return kinds(check([str(jsonl(rows))], model=str(model)))

    talks = [talk(f"one {i}", "two", "three", f"four {i}") for i in range(30)]
    open_end = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert with_template(open_end, talks)["no_end"] == 30
    changing = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '' if loop.last or m.role == 'user' else '(earlier) ' }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    assert with_template(changing, talks)["history"] == 30
    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    )
    assert with_template(forgetful, [talk(f"one {i}", "<think>why</think>two") for i in range(30)])["thinking"] == 30


@pytest.mark.parametrize(
    "row", [{"chosen": "a", "rejected": "b"}, {"completion": "a", "label": True}, {"answer": "a"}]
)  # fmt: skip
def test_rows_for_other_objectives_can_be_looked_at(row: dict, jsonl: Write, model: Path) -> None:
    path = str(jsonl([{"prompt": f"question {i}", **row} for i in range(30)]))
    found = check([path], model=str(model))
    assert found.samples == 28 and kinds(found) == {"objective": 1}
    assert not kinds(check([path], model=str(model), samples=SamplesConfig(preference="chosen")))


def test_double_beginning_of_text(jsonl: Write, tmp_path: Path) -> None:
    from tests.chat_families import hf_tokenizer

    template = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    hf_tokenizer("bytes", template, "</s>").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    assert kinds(check([str(jsonl(GOOD))], model=str(tmp_path / "model")))["double_bos"] == 57


def test_lengths_are_warned_about(jsonl: Write, model: Path) -> None:
    found = check(
        [str(jsonl([*GOOD, talk("hm", "word " * 400)]))], model=str(model), samples=SamplesConfig(max_length=128)
    )
    assert kinds(found)["long"] == 1 and found.truncated == 1
    assert next(f for f in found.findings if f.kind == "long").places == [f"{found.data[0]}:61"]
    config = SamplesConfig(max_length=128, too_long="drop")
    found = check(list(found.data), model=str(model), samples=config)
    assert kinds(found)["dropped"] == 1 and found.dropped == 1
    found = check(list(found.data), model=str(model), samples=SamplesConfig(max_length=128, min_length=60))
    assert kinds(found)["short"] == found.short == 60 and found.samples + found.validation == 1
    assert "60 too short" in str(found)


# -- convert ----------------------------------------------------------------------------------------------------------

RICH = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]},
        {"role": "tool", "content": "20"},
        {"role": "assistant", "content": "20 degrees.", "weight": 0.5},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
}  # fmt: skip


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_convert_there_and_back(jsonl: Write, tmp_path: Path) -> None:
    path = jsonl([RICH, *GOOD[:3]])
    share, back = tmp_path / "share.jsonl", tmp_path / "back.jsonl"
    assert main(["data", "convert", str(path), "--out", str(share), "--to", "sharegpt"]) == 0
    first = rows_of(share)[0]
    assert [turn["from"] for turn in first["conversations"]] == ["system", "human", "function_call", "tool", "gpt"]
    assert main(["data", "convert", str(share), "--out", str(back)]) == 0
    assert rows_of(back) == [RICH, *GOOD[:3]]


def test_convert_writes_arrays_and_splits(jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl([{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}])
    out = tmp_path / "out.json"
    assert main(["data", "convert", str(path), "--out", str(out), "--json"]) == 0
    assert len(json.loads(out.read_text())) == 2
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    jsonl(GOOD[:4], "set/train.jsonl")
    jsonl(GOOD[4:6], "set/valid.jsonl")
    assert main(["data", "convert", str(tmp_path / "set"), "--out", str(tmp_path / "made")]) == 0
    assert len(rows_of(tmp_path / "made" / "train.jsonl")) == 4 and len(rows_of(tmp_path / "made" / "valid.jsonl")) == 2


def test_convert_does_not_overwrite_by_itself(jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = jsonl(GOOD[:2]), tmp_path / "out.jsonl"
    out.write_text("mine\n")
    assert main(["data", "convert", str(path), "--out", str(out)]) == 2
    assert out.read_text() == "mine\n" and "--overwrite" in capsys.readouterr().err
    assert main(["data", "convert", str(path), "--out", str(out), "--overwrite"]) == 0
    assert len(rows_of(out)) == 2


def test_convert_publishes_a_directory_at_once_or_adds_to_one(
    jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(GOOD[:4], "set/train.jsonl")
    jsonl([GOOD[4], {"text": "no conversation"}], "set/valid.jsonl")
    made = tmp_path / "made"
    assert main(["data", "convert", str(tmp_path / "set"), "--out", str(made)]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    jsonl(GOOD[4:5], "set/valid.jsonl")
    made.mkdir()
    (made / "notes").write_text("mine")
    (made / ".train.jsonl.tmp-dead").mkdir()  # of a process that was killed
    assert main(["data", "convert", str(tmp_path / "set"), "--out", str(made)]) == 0
    assert sorted(path.name for path in made.iterdir()) == ["notes", "train.jsonl", "valid.jsonl"]
    renamed: list[str] = []
    monkeypatch.setattr(publishing, "publish", lambda scratch, target: renamed.append(f"{target}"))
    assert main(["data", "convert", str(tmp_path / "set"), "--out", str(tmp_path / "new")]) == 0
    assert renamed == [str(tmp_path / "new")]  # both splits by one rename


@pytest.mark.parametrize("out", ["out.json", "out.jsonl"])
def test_convert_to_a_full_disk(
    out: str, jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(GOOD[:2])
    (tmp_path / out).write_text("mine")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert main(["data", "convert", str(path), "--out", str(tmp_path / out), "--overwrite"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{out}: the disk ran full" in capsys.readouterr().err
    assert (tmp_path / out).read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


ODD = {
    "messages": [
        {"role": "Human", "content": "a"},
        {"role": "narrator", "content": "b"},
        {"role": "AI", "content": "c"},
    ]
}


def test_roles_strict(jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl([GOOD[0], ODD])
    assert main(["data", "convert", str(path), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "data.jsonl:2: messages[0].role is 'Human'" in capsys.readouterr().err
    assert [item.name for item in tmp_path.iterdir()] == ["data.jsonl"]


def test_roles_coerced(jsonl: Write, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", str(jsonl([ODD])), "--out", str(out), "--roles", "coerce"]) == 0
    assert [message["role"] for message in rows_of(out)[0]["messages"]] == ["user", "user", "assistant"]


TURNS = [{"from": "wizard", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"conversation": TURNS}, []),
        ({"dialogue": TURNS}, ["--columns", "{conversations: dialogue}"]),
        ({"conversations": json.dumps(TURNS)}, []),
        ({"prompt": [{"role": "wizard", "content": "a"}], "completion": "b"}, []),
    ],
    ids=["one conversation", "a key of one's own", "JSON in a text", "a prompt of messages"],
)
def test_roles_are_coerced_wherever_turns_stand(
    row: dict[str, Any], flags: list[str], jsonl: Write, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", str(jsonl([row])), "--out", str(out), "--roles", "coerce", *flags]) == 0
    assert [message["role"] for message in rows_of(out)[0]["messages"]] == ["user", "assistant"]


def test_advice_names_flags_that_the_verb_has(jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl([GOOD[0], {"prompt": "a", "completion": "b"}, {"question": "a", "answer": "b"}])
    assert main(["data", "convert", str(path), "--out", str(tmp_path / "out.jsonl")]) == 2
    said = capsys.readouterr().err
    assert " --format." in said and " --columns " in said and "samples." not in said
    path = jsonl([{"--samples.question": "a", "question": "b", "answer": "c"}])
    assert main(["data", "convert", str(path), "--out", str(tmp_path / "out.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "'--samples.question'" in said and "Try --columns " in said


def test_roles_dropped(jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "elf", "value": "b"},
                {"from": "gpt", "value": "c"},
            ]
        }
    ]
    assert main(["data", "convert", str(jsonl(rows)), "--out", str(out), "--roles", "drop"]) == 0
    assert [message["content"] for message in rows_of(out)[0]["messages"]] == ["a", "c"]
    assert "messages of unknown roles that were left out: 1" in capsys.readouterr().out


def test_rows_that_are_no_conversation(jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "convert", str(jsonl([{"text": "a"}])), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "data.jsonl:1: a document row is no conversation" in capsys.readouterr().err
