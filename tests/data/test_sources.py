"""Sources and formats: the same rows, however they come."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxlora.data import BatchConfig, DataSplits, SamplesConfig, load, plan_epoch
from mlxlora.data.formats import FORMATS, detect
from mlxlora.data.problems import Problems
from mlxlora.data.records import Conversation, Judged, Preference, Question
from mlxlora.data.sources import READERS
from mlxlora.errors import DataError
from mlxlora.tokenizer import Tokenizer

PAIRS = [(f"question {i}", f"answer {i}") for i in range(5)]
MESSAGES = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS
]  # fmt: skip
WHOLE = SamplesConfig(validation_split=0)


def tokens(splits: DataSplits) -> list[list[int]]:
    return [sample.tokens.tolist() for sample in splits.train]


@pytest.fixture
def expected(jsonl: Callable[..., Path], tokenizer: Tokenizer) -> list[list[int]]:
    return tokens(load(jsonl(MESSAGES, "expected.jsonl"), tokenizer, WHOLE))


def csv_of(header: list[str], rows: list[list[str]], delimiter: str = ",") -> bytes:
    made = io.StringIO()
    writer = csv.writer(made, delimiter=delimiter)
    writer.writerows([header, *rows])
    return made.getvalue().encode()


def parquet_of(rows: list[dict]) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as writer

    made = io.BytesIO()
    writer.write_table(arrow.Table.from_pylist(rows), made, row_group_size=2)
    return made.getvalue()


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


SHAREGPT = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in PAIRS]
ALPACA = [{"instruction": q, "input": "", "output": a} for q, a in PAIRS]
COMPLETION = [{"prompt": q, "completion": a} for q, a in PAIRS]
PROMPT_MESSAGES = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in MESSAGES]

FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "byte order mark": ("a.jsonl", lambda: b"\xef\xbb\xbf" + lines(MESSAGES)),
    "crlf, blank lines, comments": (
        "a.jsonl",
        lambda: b"# made by hand\r\n\r\n" + lines(MESSAGES).replace(b"\n", b"\r\n# next\r\n"),
    ),
    "no newline at the end": ("a.jsonl", lambda: lines(MESSAGES).rstrip()),
    "ndjson": ("a.ndjson", lambda: lines(MESSAGES)),
    "upper case suffix": ("a.JSONL", lambda: lines(MESSAGES)),
    "json array": ("a.json", lambda: json.dumps(MESSAGES, indent=2).encode()),
    "json array in an object": ("a.json", lambda: json.dumps({"version": 1, "data": MESSAGES}).encode()),
    "jsonl by the name of json": ("a.json", lambda: lines(MESSAGES)),
    "sharegpt": ("a.jsonl", lambda: lines(SHAREGPT)),
    "sharegpt with roles": ("a.jsonl", lambda: lines([{"conversations": row["messages"]} for row in MESSAGES])),
    "alpaca": ("a.json", lambda: json.dumps(ALPACA).encode()),
    "prompt and completion": ("a.jsonl", lambda: lines(COMPLETION)),
    "prompt and completion as messages": ("a.jsonl", lambda: lines(PROMPT_MESSAGES)),
    "csv": ("a.csv", lambda: csv_of(["prompt", "completion"], [list(pair) for pair in PAIRS])),
    "tsv": ("a.tsv", lambda: csv_of(["prompt", "completion"], [list(pair) for pair in PAIRS], "\t")),
    "csv with semicolons": ("a.csv", lambda: csv_of(["prompt", "completion"], [list(pair) for pair in PAIRS], ";")),
    "messages as text": ("a.jsonl", lambda: lines([{"messages": json.dumps(row["messages"])} for row in MESSAGES])),
    "sharegpt as text": (
        "a.jsonl",
        lambda: lines([{"conversations": json.dumps(row["conversations"])} for row in SHAREGPT]),
    ),
    "csv with json cells": ("a.csv", lambda: csv_of(["messages"], [[json.dumps(row["messages"])] for row in MESSAGES])),
    "parquet": ("a.parquet", lambda: parquet_of(COMPLETION)),
    "parquet with messages": ("a.parquet", lambda: parquet_of(MESSAGES)),
}


@pytest.mark.parametrize("name", list(FILES))
def test_files(name: str, tmp_path: Path, tokenizer: Tokenizer, expected: list[list[int]]) -> None:
    file, content = FILES[name]
    (tmp_path / file).write_bytes(content())
    assert tokens(load(tmp_path / file, tokenizer, WHOLE)) == expected


def test_a_json_array_larger_than_the_reader_s_window(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "p" * 3000 + str(i), "completion": f'é{i} \\u00e9 "quoted" [x]'} for i in range(800)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    splits = load(tmp_path / "a.json", tokenizer, SamplesConfig(validation_split=0, max_length=8000))
    assert len(splits.train) == 800
    assert splits.train.origin(799).endswith(f":{2 + 799 * 4}")


def test_zip_and_directory(tmp_path: Path, tokenizer: Tokenizer, expected: list[list[int]]) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("set/train.jsonl", lines(MESSAGES))
        archive.writestr("set/valid.json", json.dumps(MESSAGES[:2]))
        archive.writestr("__MACOSX/set/._train.jsonl", b"\x00")
        archive.writestr("README.md", b"What this is about.")
    splits = load(tmp_path / "a.zip", tokenizer)
    assert tokens(splits) == expected and splits.valid is not None and len(splits.valid) == 2
    assert splits.train.origin(0).endswith("a.zip!set/train.jsonl:1")
    folder = tmp_path / "folder"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        archive.extractall(folder)
    splits = load(folder, tokenizer)
    assert tokens(splits) == expected and splits.valid is not None


def test_an_archive_of_many_files_is_read_in_one_pass(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(60):
            archive.writestr(f"{'valid' if i % 3 == 0 else 'train'}-{i:02}.jsonl", lines([COMPLETION[i % 5]]))
    opened = []
    real = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *a, **k: (opened.append(a), real(*a, **k))[1])
    splits = load(tmp_path / "a.zip", tokenizer, SamplesConfig(cache=tmp_path / "cache"))
    assert len(splits.train) == 40 and splits.valid is not None and len(splits.valid) == 20
    assert splits.train.origin(39).endswith("a.zip!train-59.jsonl:1") and len(opened) <= 4


def test_a_directory_without_splits_is_all_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "notes").mkdir()
    for name in ("a.txt", "b.md", "notes/c.txt"):
        (tmp_path / name).write_text(f"Text of {name}\r\n")
    splits = load(tmp_path, tokenizer, WHOLE)
    assert len(splits.train) == 3 and set(splits.formats.values()) == {"text"}


def test_beside_rows_a_readme_is_no_data(tmp_path: Path, tokenizer: Tokenizer, expected: list[list[int]]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(lines(MESSAGES))
    (folder / "README.md").write_text("# About")
    (folder / "dataset_info.json").write_text("{}")
    (folder / ".hidden.jsonl").write_text("{")
    assert tokens(load(folder, tokenizer, WHOLE)) == expected


def test_a_validation_file_and_a_validation_split(jsonl: Callable[..., Path], tokenizer: Tokenizer) -> None:
    path, other = jsonl(MESSAGES * 20, "t.jsonl"), jsonl(MESSAGES[:1], "v.jsonl")
    given = load(path, tokenizer, SamplesConfig(validation=other))
    assert given.valid is not None and len(given.valid) == 1 and len(given.train) == 100
    different = jsonl([{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(100)], "d.jsonl")
    one, two = (load(different, tokenizer, SamplesConfig(validation_split=0.1), seed=3) for _ in range(2))
    assert one.valid is not None and two.valid is not None and len(one.valid) == 10
    assert one.valid.fingerprint == two.valid.fingerprint
    origins = {data.origin(i) for data in (one.train, one.valid) for i in range(len(data))}
    assert len(origins) == 100
    third = load(different, tokenizer, SamplesConfig(validation_split=0.1), seed=4).valid
    assert third is not None and third.fingerprint != one.valid.fingerprint


def test_equal_samples_stay_on_one_side_of_the_split(jsonl: Callable[..., Path], tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"q{i % 20}", "completion": f"a{i % 20}"} for i in range(100)]
    splits = load(jsonl(rows), tokenizer, SamplesConfig(validation_split=0.2))
    assert splits.valid is not None and len(splits.valid) > 0
    assert not set(splits.train.hashes.tolist()) & set(splits.valid.hashes.tolist())


def test_weighted_sources(jsonl: Callable[..., Path], tokenizer: Tokenizer) -> None:
    one = jsonl([{"prompt": f"q{i}", "completion": "a"} for i in range(40)], "one.jsonl")
    two = jsonl([{"prompt": f"r{i}", "completion": "a"} for i in range(40)], "two.jsonl")
    data = load([f"{one}=2", f"{two}=0.5"], tokenizer, WHOLE).train
    assert len(data) == 80 and data.repeats is not None
    counts = np.zeros(80, int)
    for epoch in range(50):
        plan = plan_epoch(data.lengths, BatchConfig(), seed=0, epoch=epoch, repeats=data.repeats)
        for planned in plan:
            np.add.at(counts, list(planned.samples), 1)
    assert (counts[:40] == 100).all()
    assert counts[40:].min() > 15 and counts[40:].max() < 35 and abs(counts[40:].mean() - 25) < 2
    with pytest.raises(DataError, match="weight is 0"):
        load([f"{one}=0"], tokenizer)


def test_columns(jsonl: Callable[..., Path], tokenizer: Tokenizer, expected: list[list[int]]) -> None:
    path = jsonl({"frage": q, "antwort": a, "id": 1} for q, a in PAIRS)
    config = SamplesConfig(validation_split=0, columns={"prompt": "frage", "completion": "antwort"})
    assert tokens(load(path, tokenizer, config)) == expected
    with pytest.raises(DataError, match=r"has no 'frag'\. Did you mean 'frage'"):
        load(path, tokenizer, SamplesConfig(columns={"prompt": "frag"}))


def test_a_format_that_is_said(jsonl: Callable[..., Path], tokenizer: Tokenizer, expected: list[list[int]]) -> None:
    path = jsonl({"prompt": q, "completion": a, "text": "notes", "label": 1} for q, a in PAIRS)
    assert tokens(load(path, tokenizer, SamplesConfig(validation_split=0, format="completion"))) == expected


def test_hub_data_sets_stream(tmp_path: Path, tokenizer: Tokenizer, expected: list[list[int]]) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(lines(MESSAGES))
    (tmp_path / "set" / "validation.jsonl").write_bytes(lines(MESSAGES[:2]))
    splits = load(f"hub:{tmp_path / 'set'}", tokenizer)
    assert tokens(splits) == expected and splits.valid is not None and len(splits.valid) == 2


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (MESSAGES[0], "messages"), (SHAREGPT[0], "sharegpt"), (ALPACA[0], "alpaca"), (COMPLETION[0], "completion"),
        ({"text": "a"}, "text"), ({"chosen": "a", "rejected": "b", "prompt": "c"}, "preference"),
        ({"prompt": "a", "completion": "b", "label": False}, "kto"), ({"prompt": "a", "answer": "b"}, "answer"),
        ({"conversation": SHAREGPT[0]["conversations"]}, "sharegpt-conversation"), ({"x": 1}, None),
    ],
)  # fmt: skip
def test_formats_are_told_from_the_keys(row: dict, name: str | None) -> None:
    assert detect(row) == name


def test_rows_for_other_objectives() -> None:
    pair = FORMATS["preference"].read({"prompt": MESSAGES[0]["messages"][:1], "chosen": "good", "rejected": "bad"})
    assert isinstance(pair, Preference) and isinstance(pair.chosen, Conversation)
    assert [m.content for m in pair.chosen.messages] == ["question 0", "good"]
    judged = FORMATS["kto"].read({"prompt": "a", "completion": "b", "label": "True"})
    assert isinstance(judged, Judged) and judged.good
    question = FORMATS["answer"].read({"prompt": "1 + 1", "answer": 2})
    assert isinstance(question, Question) and question.answer == "2"


def test_tool_calls_in_every_shape() -> None:
    shapes: list[dict[str, Any]] = [
        {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"function_call": {"name": "f", "arguments": '{"x": 1}'}},
    ]
    wanted = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    for shape in shapes:
        record = FORMATS["messages"].read({"messages": [{"role": "assistant", "content": None, **shape}]})
        assert isinstance(record, Conversation) and record.messages[0].tool_calls == [wanted]
    turn = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    record = FORMATS["sharegpt"].read({"conversations": [turn]})
    assert isinstance(record, Conversation) and record.messages[0].tool_calls == [wanted]


def test_parquet_of_a_kilobyte_that_holds_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One text, told once, in every row: a few are decoded at a time, and a row may be as long as a line of JSON."""
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("mlxlora.data.parquet_rows.LONGEST_LINE", 100_000)
    texts = arrow.array(["short", "long " * 30_000, "middle " * 10_000])
    column = arrow.DictionaryArray.from_arrays(arrow.array([0, 1, 2, 2, 2, 0, *[1] * 15]), texts)
    writer.write_table(arrow.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 2000
    problems = Problems()
    with (tmp_path / "a.parquet").open("rb") as file:
        rows = list(READERS[".parquet"](file, "a.parquet", problems))
    assert [row.line for row in rows] == [1, 3, 4, 5, 6] and problems.count == 16
    assert "the row is 150.0 kB long; 100.0 kB are allowed" in str(problems.items[0])


@pytest.mark.parametrize("told", [True, False], ids=["dictionary in the schema", "plain schema"])
def test_parquet_row_that_refers_to_one_text_a_million_times(tmp_path: Path, told: bool) -> None:
    """It is measured before it is made: 500 GB would not fit anywhere."""
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    times = 1_000_000
    references = arrow.DictionaryArray.from_arrays(
        arrow.array([0] * times + [1, 1], arrow.int32()), arrow.array(["x" * 500_000, "short"])
    )
    turns = arrow.StructArray.from_arrays([references, references], ["role", "content"])
    rows = arrow.ListArray.from_arrays(arrow.array([0, times, times + 2], arrow.int32()), turns)
    path = tmp_path / "a.parquet"
    writer.write_table(arrow.table({"messages": rows}), path, compression="zstd", store_schema=told)
    assert path.stat().st_size < 5000
    problems = Problems()
    with path.open("rb") as file:
        found = list(READERS[".parquet"](file, "a.parquet", problems))
    assert [(row.line, len(row.value["messages"])) for row in found] == [(2, 2)]
    assert found[0].value["messages"][0] == {"role": "short", "content": "short"}
    assert "a.parquet:1" in str(problems.items[0]) and "the row is 1.0 TB long" in str(problems.items[0])


def test_parquet_of_every_kind_of_column(tmp_path: Path) -> None:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = [
        {
            "text": "a",
            "n": 1,
            "x": 0.5,
            "map": [("k", "v")],
            "fixed": [1, 2],
            "deep": [[{"a": ["b", None]}]],
            "no": None,
        },
        {"text": "a", "n": 2, "x": None, "map": [], "fixed": [3, 4], "deep": [], "no": None},
    ]
    kinds = {
        "text": arrow.dictionary(arrow.int8(), arrow.string()), "n": arrow.dictionary(arrow.int8(), arrow.int64()),
        "x": arrow.float32(), "map": arrow.map_(arrow.string(), arrow.string()), "fixed": arrow.list_(arrow.int8(), 2),
        "deep": arrow.large_list(arrow.list_(arrow.struct([("a", arrow.list_(arrow.string()))]))), "no": arrow.string(),
    }  # fmt: skip
    table = arrow.Table.from_pylist(values, schema=arrow.schema(list(kinds.items())))
    writer.write_table(table, tmp_path / "a.parquet")
    problems = Problems()
    with (tmp_path / "a.parquet").open("rb") as file:
        rows = list(READERS[".parquet"](file, "a.parquet", problems))
    assert not problems.items
    assert [row.value for row in rows] == [{k: v for k, v in row.items() if v is not None} for row in values]


def test_parquet_whose_pages_blow_up_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("mlxlora.data.parquet_rows.LARGE", 1 << 20)
    table = arrow.table({"text": ["x" * 4_000_000]})
    writer.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    problems = Problems()
    with (tmp_path / "a.parquet").open("rb") as file:
        assert list(READERS[".parquet"](file, "a.parquet", problems)) == []
    assert "4.0 MB of the column text are packed into" in str(problems.items[0])


def test_records_are_encoded_in_chunks_of_bounded_size() -> None:
    """Whatever their kind: a thousand rows of megabytes do not wait for each other."""
    from mlxlora.data.reader import CHUNK_CHARACTERS, _chunks
    from mlxlora.data.records import Completion, Document, History, Judged, Message, Question, TextRun

    text = "x" * (CHUNK_CHARACTERS // 4)
    talk = Conversation([Message("user", text), Message("assistant", "a", thinking=text)])
    half = Completion(text, text)
    for record in (
        Document(text * 2), half, talk, Judged(half, True), Preference(Completion(text, "a"), Completion(text, "b")),
        Question(text, text), Question(talk, "1"), History([TextRun(text), TextRun(text)]),
    ):  # fmt: skip
        assert [len(chunk) for chunk in _chunks((record, n) for n in range(7))] in ([3, 3, 1], [2, 2, 2, 1]), record
