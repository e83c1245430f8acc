"""The doors themselves: what is published when, and what is refused before anything is written."""

from __future__ import annotations

import shlex
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mlxlora.errors import ConfigError, MlxLoraError, UnsupportedError
from mlxlora_convert import export as doors
from mlxlora_convert import formats as table
from mlxlora_convert.jobs import ExportJob
from mlxlora_convert.probe import ReadBack, ReaderMissing


@dataclass(frozen=True, slots=True)
class Shout:
    """Options of the format below."""

    text: str = "hello"


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Formats made here: one writes a directory, one a file, one has no reader; the test sets what the reader sees."""
    shouting, filing, alone = (types.ModuleType(name) for name in ("shouting", "filing", "alone"))

    def write(job: ExportJob) -> list[str]:
        job.out.mkdir(exist_ok=True)
        (job.out / "a.txt").write_text(job.option(Shout).text)
        return ["one note"]

    def write_file(job: ExportJob) -> list[str]:
        job.out.write_text("x")
        return []

    def read_back(job: ExportJob, probe: object) -> ReadBack:
        return ReadBack("the reader", 64, shouting.seen, 1e-3)

    def missing(job: ExportJob, probe: object) -> ReadBack:
        raise ReaderMissing("the reader", "pip install reader")

    vars(shouting).update(write=write, read_back=read_back, seen=1e-6)
    vars(filing).update(write=write_file, read_back=read_back)
    vars(alone).update(write=write, read_back=missing)
    for made in (shouting, filing, alone):
        monkeypatch.setitem(sys.modules, f"mlxlora_convert.{made.__name__}", made)
    entries = {
        "shout": table.Format("shout", writer="shouting", options=("shout",)),
        "one": table.Format("one file", writer="filing", suffix=".one", marks=("*.one",)),
        "alone": table.Format("adapter", writer="alone", adapter=True),
        "readable": table.Format("readable", reader="shouting", marks=("*.readable",)),
    }
    for name, entry in entries.items():
        monkeypatch.setitem(table.FORMATS, name, entry)
    return shouting


def test_what_is_written_is_published_with_what_the_reader_saw(formats: types.ModuleType, tmp_path: Path) -> None:
    result = doors.export("base", "shout", tmp_path / "out")
    assert result.files == ("a.txt",) and result.bytes == 5 and result.notes == ("one note",)
    assert "read back by the reader, 64 tokens, max |Δ logprob| 1.0e-06" in str(result)
    assert (tmp_path / "out" / "a.txt").read_text() == "hello"


def test_one_command_comes_next(formats: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "two words"
    done = doors.export("base", "shout", out)
    assert shlex.split(done.next) == ["mlxlora", "upload", str(out), "--repo", "OWNER/NAME"]
    entry = replace(table.FORMATS["shout"], after=table.FORMATS["ollama"].after)
    monkeypatch.setitem(table.FORMATS, "shout", entry)
    done = doors.export("base", "shout", tmp_path / "three words")
    assert shlex.split(done.next) == ["ollama", "create", "NAME", "-f", str(tmp_path / "three words/Modelfile")]
    assert str(done).lower().count("next: ") == 1 and str(done).endswith(f"\nnext: {done.next}")


@pytest.mark.parametrize("seen", [0.5, float("nan")])
def test_a_result_that_reads_as_another_model_is_not_published(
    formats: types.ModuleType, tmp_path: Path, seen: float
) -> None:
    vars(formats)["seen"] = seen
    with pytest.raises(MlxLoraError, match="not the same model"):
        doors.export("base", "shout", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert doors.export("base", "shout", tmp_path / "out", check=False).check is None


def test_a_missing_reader_is_said(formats: types.ModuleType, tmp_path: Path) -> None:
    result = doors.export("base", "alone", tmp_path / "out", adapter=["some"])
    assert result.check is None
    assert "Not read back: the reader is not installed (pip install reader)." in result.notes


def test_one_file(formats: types.ModuleType, tmp_path: Path) -> None:
    assert doors.export("base", "one", tmp_path / "m.one").files == ("m.one",)
    assert [path.name for path in tmp_path.iterdir()] == ["m.one"]
    with pytest.raises(ConfigError, match=r"must end in \.one"):
        doors.export("base", "one", tmp_path / "m.two")


def test_refusals(formats: types.ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'shout'"):
        doors.export("base", "shot", tmp_path / "out")
    with pytest.raises(ConfigError, match="none was given"):
        doors.export("base", "alone", tmp_path / "out")
    with pytest.raises(UnsupportedError, match="readable cannot be written"):
        doors.export("base", "readable", tmp_path / "out")
    with pytest.raises(ConfigError, match="--to alone does not have them"):
        doors._options("--to alone", (), shout=Shout())
    assert doors._options("--to shout", ("shout",), shout=Shout("x"), other=None) == (Shout("x"),)
    assert not list(tmp_path.iterdir())


def test_formats_are_recognised_by_their_files(formats: types.ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x.readable").touch()
    assert table.recognise(tmp_path) == table.recognise(tmp_path / "x.readable") == "readable"
    (tmp_path / "x.readable").rename(tmp_path / "x.foreign")
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is a run: .*--adapter .*run"):
        table.recognise(tmp_path / "run")
    with pytest.raises(ConfigError, match="in no format that can be read"):
        table.recognise(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        table.recognise(tmp_path / "nothing")


def test_every_function_of_the_table_exists() -> None:
    for name, entry in table.FORMATS.items():
        assert entry.writer or entry.reader, name
        if entry.writer:
            assert callable(table.module(entry.writer).write) and callable(table.module(entry.writer).read_back), name
        if entry.reader:
            assert callable(table.module(entry.reader).read), name
