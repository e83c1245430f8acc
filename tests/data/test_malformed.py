"""Wrong files: exit code 2, where it stands, what is wrong and what to do; nothing written, no traceback."""
# ruff: noqa: E501 - one line a case

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxlora.cli import main
from tests import tiny

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


def messages(*items: object) -> bytes:
    return (json.dumps({"messages": list(items)}) + "\n").encode()


def row(**keys: object) -> bytes:
    return (json.dumps(keys) + "\n").encode()


ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Hello"}


def zipped(members: dict[str, bytes], *, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return made.getvalue()


def linked() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        info = zipfile.ZipInfo("train.jsonl")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return made.getvalue()


def parquet() -> bytes:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as writer

    made = io.BytesIO()
    writer.write_table(arrow.table({"text": ["one two three"] * 50}), made)
    return made.getvalue()


# name of the file, its bytes, and what the message must say (a regular expression after "file:line")
CASES: dict[str, tuple[str, bytes | Callable[[], bytes], str]] = {
    "empty": ("a.jsonl", b"", "no rows.*Add rows"),
    "blank lines": ("a.jsonl", b"\n\n  \n", "no rows"),
    "comments alone": ("a.jsonl", b"# one\n# two\n", "no rows"),
    "invalid utf-8": ("a.jsonl", GOOD.encode() + b'{"text": "\xff\xfe"}\n', r"a.jsonl:2: byte 11.*not UTF-8.*UTF-8"),
    "latin-1": ("a.jsonl", '{"text": "grün"}\n'.encode("latin-1"), "a.jsonl:1: .*UTF-8"),
    "utf-16": ("a.jsonl", GOOD.encode("utf-16"), "a.jsonl:1: .*UTF-16.*Save it as UTF-8"),
    "utf-16 without mark": ("a.jsonl", GOOD.encode("utf-16-le"), "a.jsonl:1: .*UTF-16"),
    "utf-32": ("a.jsonl", GOOD.encode("utf-32"), "a.jsonl:1: .*UTF-16"),
    "binary": ("a.jsonl", bytes(range(256)) * 10, "a.jsonl:1"),
    "truncated": ("a.jsonl", (GOOD + GOOD[:40]).encode(), "a.jsonl:2: not valid JSON.*cut off"),
    "two values in a line": ("a.jsonl", b'{"text": "a"} {"text": "b"}\n', "a.jsonl:1: not valid JSON at column 15"),
    "single quotes": ("a.jsonl", b"{'text': 'a'}\n", "a.jsonl:1: not valid JSON"),
    "trailing comma": ("a.jsonl", b'{"text": "a",}\n', "a.jsonl:1: not valid JSON"),
    "not an object": ("a.jsonl", b'["a", "b"]\n', "a.jsonl:1: .*object, not an array.*A row looks like"),
    "a string": ("a.jsonl", b'"text"\n', "a.jsonl:1: .*object, not a string"),
    "a number": ("a.jsonl", b"17\n", "a.jsonl:1: .*object, not a number"),
    "null": ("a.jsonl", b"null\n", "a.jsonl:1: .*object, not null"),
    "NaN": ("a.jsonl", b'{"text": NaN}\n', "a.jsonl:1: NaN is not JSON"),
    "duplicate keys": ("a.jsonl", b'{"text": "a", "text": "b"}\n', "a.jsonl:1: the key 'text' stands twice"),
    "deep nesting": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "a.jsonl:1: nested too deeply"),
    "half a surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: .*surrogate"),
    "huge number": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "a.jsonl:1"),
    "long line": ("a.jsonl", b'{"text": "' + b"a" * 100_000_000 + b'"}\n', "a.jsonl:1: the line is 100.0 MB long"),
    "unknown keys": ("a.jsonl", row(frage="a", antwort="b"), "a.jsonl:1: the keys 'frage', 'antwort'.*columns"),
    "a key misspelt": ("a.jsonl", row(mesages=[ASKED, SAID]), "a.jsonl:1: .*'messages' is missing"),
    "keys of others": ("a.jsonl", row(question="a", answer="b"), r"a.jsonl:1: .*columns '\{prompt: question, completion: answer\}'"),
    "sharegpt turns": ("a.jsonl", row(messages=[{"from": "human", "value": "a"}]), r"a.jsonl:1: messages\[0\] has no 'role'.*columns '\{conversations: messages\}'"),
    "messages as broken text": ("a.jsonl", row(messages="[{"), "a.jsonl:1: 'messages' is a string that is not JSON"),
    "json of two arrays": ("a.json", b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "a.json:1: .*several arrays of rows .'train', 'test'.*train.json"),
    "no keys": ("a.jsonl", b"{}\n", "a.jsonl:1: the keys no keys"),
    "messages no list": ("a.jsonl", row(messages="Hi"), "a.jsonl:1: 'messages' must be an array"),
    "messages an object": ("a.jsonl", row(messages=ASKED), "a.jsonl:1: 'messages' must be an array"),
    "messages empty": ("a.jsonl", row(messages=[]), "a.jsonl:1: 'messages' is empty"),
    "messages null": ("a.jsonl", GOOD.encode() + row(messages=None), "a.jsonl:2: 'messages' must be an array of messages, not null"),
    "message a string": ("a.jsonl", messages("Hi"), r"a.jsonl:1: messages\[0\] must be an object"),
    "message without role": ("a.jsonl", messages({"content": "a"}), r"a.jsonl:1: messages\[0\] has no 'role'"),
    "role misspelt": ("a.jsonl", messages({"role": "asistant", "content": "a"}), "'asistant'.*Did you mean 'assistant'"),
    "role unknown": ("a.jsonl", messages({"role": "narrator", "content": "a"}), r"messages\[0\].role is 'narrator'"),
    "role a number": ("a.jsonl", messages({"role": 1, "content": "a"}), r"messages\[0\].role must be a string"),
    "content null": ("a.jsonl", messages(ASKED, {"role": "assistant", "content": None}), r"messages\[1\].content is missing"),
    "content missing": ("a.jsonl", messages({"role": "user"}), r"messages\[0\].content is missing"),
    "content a number": ("a.jsonl", messages({"role": "user", "content": 7}), "content must be a string, not a number"),
    "content an object": ("a.jsonl", messages({"role": "user", "content": {}}), "content must be a string, not an object"),
    "content an image": (
        "a.jsonl",
        messages({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, SAID),
        r"messages\[0\].content\[0\] is image_url, not text",
    ),
    "weight a string": ("a.jsonl", messages(ASKED, SAID | {"weight": "1"}), r"messages\[1\].weight must be a number"),
    "weight negative": ("a.jsonl", messages(ASKED, SAID | {"weight": -1}), r"messages\[1\].weight is -1"),
    "train a string": ("a.jsonl", messages(ASKED, SAID | {"train": "no"}), r"messages\[1\].train must be true or false"),
    "tool calls no list": ("a.jsonl", messages(ASKED, SAID | {"tool_calls": "f"}), r"tool_calls must be an array"),
    "tool call without name": ("a.jsonl", messages(ASKED, SAID | {"tool_calls": [{}]}), r"tool_calls\[0\] has no function name"),
    "tool arguments broken": (
        "a.jsonl",
        messages(ASKED, SAID | {"tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}),
        r"tool_calls\[0\].arguments is a string that is not JSON",
    ),
    "tools no list": ("a.jsonl", row(messages=[ASKED, SAID], tools=3), "'tools' must be an array"),
    "tool without name": ("a.jsonl", row(messages=[ASKED, SAID], tools=[{}]), r"tools\[0\] has no name"),
    "name a number": ("a.jsonl", messages(ASKED | {"name": 3}, SAID), r"messages\[0\].name must be a string"),
    "mixed formats": ("a.jsonl", GOOD.encode() + row(text="a"), "a.jsonl:2: this row has the format 'text', but line 1"),
    "prompt a number": ("a.jsonl", row(prompt=1, completion="a"), "a.jsonl:1: 'prompt' must be an array"),
    "completion empty": ("a.jsonl", row(prompt="a", completion=""), "a.jsonl:1: 'completion' is empty"),
    "text a number": ("a.jsonl", row(text=3), "a.jsonl:1: 'text' must be a string, not a number"),
    "sharegpt no list": ("a.jsonl", row(conversations="a"), "a.jsonl:1: 'conversations' must be an array"),
    "sharegpt empty": ("a.jsonl", row(conversations=[]), "a.jsonl:1: 'conversations' is empty"),
    "sharegpt without from": ("a.jsonl", row(conversations=[{"value": "a"}]), r"conversations\[0\] has no 'from'"),
    "sharegpt unknown role": ("a.jsonl", row(conversations=[{"from": "elf", "value": "a"}]), r"\[0\].from is 'elf'"),
    "sharegpt value null": ("a.jsonl", row(conversations=[{"from": "gpt", "value": None}]), "value must be a string"),
    "alpaca output a list": ("a.jsonl", row(instruction="a", output=["b"]), "a.jsonl:1: 'output' must be a string"),
    "alpaca history": ("a.jsonl", row(instruction="a", output="b", history=[["a"]]), r"history\[0\] must be a pair"),
    "label no truth": ("a.jsonl", row(prompt="a", completion="b", label="x"), "'label' must be true or false, not 'x'"),
    "chosen a number": ("a.jsonl", row(chosen=1, rejected=2), "'chosen' must be an array"),
    "preference for training": ("a.jsonl", row(prompt="a", chosen="b", rejected="c"), "another objective"),
    "json empty": ("a.json", b"", "a.json:1: the file is empty"),
    "json a string": ("a.json", b'"text"', "a.json:1: expected a JSON array"),
    "json cut off": ("a.json", b'[{"text": "a"}, {"text": "b', "a.json:1: not valid JSON"),
    "json not closed": ("a.json", b'[{"text": "a"},\n{"text": "b"}', "a.json:2: "),
    "json of strings": ("a.json", b'["a", "b"]', "a.json:1: element 1 must be an object, not a string"),
    "json without comma": ("a.json", b'[{"text": "a"} {"text": "b"}]', "a.json:1: not valid JSON"),
    "json duplicate keys": ("a.json", b'[{"text": "a",\n "text": "b"}]', "a.json:1: the key 'text' stands twice"),
    "json not utf-8": ("a.json", b'[{"text": "\xff"}]', "a.json:1: .*UTF-8"),
    "json an object": ("a.json", b'{"name": "x", "version": 1}', "a.json:1: an object that is no row"),
    "csv empty": ("a.csv", b"", "no rows"),
    "csv header alone": ("a.csv", b"prompt,completion\n", "no rows"),
    "csv cells": ("a.csv", b"prompt,completion\na,b\na,b,c\n", "a.csv:3: 3 cells, but the header has 2"),
    "csv open quote": ("a.csv", b'prompt,completion\n"a,b\n', "a.csv:2: not valid CSV"),
    "csv header twice": ("a.csv", b"text,text\na,b\n", "a.csv:1: the column 'text' stands twice"),
    "csv not utf-8": ("a.csv", b"prompt,completion\na,\xff\n", "a.csv:.*UTF-8"),
    "csv bad json": ("a.csv", b'messages\n"[{]"\n', "a.csv:2: not valid JSON"),
    "csv unknown columns": ("a.csv", b"x,y\n1,2\n", "a.csv:2: the keys 'x', 'y'"),
    "text not utf-8": ("a.txt", b"one\ntwo \xff\n", "a.txt:2: byte 0xff is not UTF-8"),
    "text utf-16": ("a.md", "Hällo".encode("utf-16"), "a.md:1: .*UTF-16"),
    "text empty": ("a.txt", b"   \n", "no rows"),
    "parquet no parquet": ("a.parquet", b"PAR1 nonsense", "a.parquet: not a whole Parquet file.*Write it again"),
    "parquet cut off": ("a.parquet", lambda: parquet()[:-20], "a.parquet: not a whole Parquet file"),
    "parquet flipped": (
        "a.parquet",
        lambda: (data := parquet())[:-8] + struct.pack("<I", 2**31 - 1) + data[-4:],
        "a.parquet: not a whole Parquet file",
    ),
    "zip no zip": ("a.zip", b"PK\x03\x04 nonsense", "a.zip.*ZIP"),
    "zip cut off": ("a.zip", zipped({"train.jsonl": GOOD.encode() * 100})[:-30], "a.zip.*ZIP"),
    "zip empty": ("a.zip", zipped({}), "a.zip.*no file that can be read"),
    "zip of others": ("a.zip", zipped({"a.exe": b"x"}), "a.zip.*no file that can be read"),
    "zip leaves the folder": ("a.zip", zipped({"../train.jsonl": GOOD.encode()}), "leaves the folder"),
    "zip absolute": ("a.zip", zipped({"/tmp/train.jsonl": GOOD.encode()}), "leaves the folder"),
    "zip expands": ("a.zip", zipped({"train.jsonl": b"\n" * 50_000_000}), "expands"),
    "zip link": ("a.zip", linked, "link"),
    "zip bad row": ("a.zip", zipped({"train.jsonl": b"{}\n"}), "a.zip!train.jsonl:1: the keys"),
    "zip flipped": (
        "a.zip",
        (lambda data: data[:60] + bytes([data[60] ^ 255]) + data[61:])(zipped({"train.jsonl": GOOD.encode() * 50})),
        "a.zip.*damaged|a.zip.*ZIP",
    ),
    "unknown suffix": ("a.docx", b"x", r"\*.docx are not known"),
    "nothing learned": ("a.jsonl", messages(ASKED) * 3, "a.jsonl:1: no token of it is learned"),
    "answers not trained": ("a.jsonl", messages(ASKED, SAID | {"train": False}), "a.jsonl:1: no token of it is learned"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.tokenizer(tmp_path_factory.mktemp("model"))
    (directory / "config.json").write_text('{"model_type": "llama"}')  # no weights: nothing may look for them
    return directory


@pytest.mark.parametrize("name", list(CASES))
def test_refused(name: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, message = CASES[name]
    path = tmp_path / file
    path.write_bytes(content() if callable(content) else content)
    out = tmp_path / "run"
    verb = ["train", "--model", str(model), "--data", str(path), "--out", str(out)]
    assert main([*verb, "--samples.cache", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error, re.S), error
    assert file in error and "Traceback" not in error
    assert not out.exists()
    assert not [item for item in (tmp_path / "cache").rglob("*") if item.suffix == ".bin"]


def test_there_are_enough() -> None:
    assert len(CASES) >= 60


def test_all_problems_of_a_file_together(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(row(messages=[]) for _ in range(12)) + b"{broken\n")
    assert main(["data", "check", str(path), "--model", str(model)]) == 2
    error = capsys.readouterr().err
    assert all(f"a.jsonl:{line}: " in error for line in range(1, 14))


def test_reading_stops_after_twenty(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(row(messages=[]) * 1000)
    assert main(["data", "check", str(path), "--model", str(model)]) == 2
    error = capsys.readouterr().err
    assert "a.jsonl:20: " in error and "a.jsonl:30: " not in error


@pytest.mark.parametrize("made", ["directory", "missing", "empty directory", "only validation"])
def test_places(made: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.jsonl"
    if made == "directory":
        path.mkdir()
        (path / "image.png").write_bytes(b"x")
    elif made == "empty directory":
        path.mkdir()
    elif made == "only validation":
        path.mkdir()
        (path / "valid.jsonl").write_text(GOOD)
    else:
        (tmp_path / "date.jsonl").write_text(GOOD)
    assert main(["data", "check", str(path), "--model", str(model)]) == 2
    error = capsys.readouterr().err
    expected = {
        "directory": "no file that can be read",
        "missing": "does not exist. Did you mean 'date.jsonl'",
        "empty directory": "no file that can be read",
        "only validation": "none for training",
    }[made]
    assert expected in error and "Traceback" not in error


def test_chat_rows_need_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.tokenizer(tmp_path / "model", template=None)
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 5)
    assert main(["data", "check", str(path), "--model", str(model)]) == 2
    assert "no chat template" in (error := capsys.readouterr().err) and "--samples.template" in error
    assert main(["data", "check", str(path), "--model", str(model), "--samples.template", "chatml"]) == 0


def test_a_tokenizer_larger_than_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.tokenizer(tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "llama", "vocab_size": 30}')
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 5)
    assert main(["train", "--model", str(model), "--data", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "a.jsonl:1: token" in (error := capsys.readouterr().err) and "vocabulary of 30" in error
    assert not (tmp_path / "run").exists()
