"""Where rows come from: files of several formats, ZIP archives and directories of them. One reader each, one table.

A reader is a generator over an open binary file. It keeps one row in memory at a time, notes what it cannot read among
the problems and goes on with the next row where that is possible.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from mlxlora.data.report import Problems
from mlxlora.errors import DataError, FormatError
from mlxlora.files import zip_members

LONGEST_LINE = 32 * 1024 * 1024  # bytes of one row
LARGEST_TEXT = 256 * 1024 * 1024  # bytes of one plain-text file: it is one document


class Row(NamedTuple):
    """One row and its line (or number, counted from 1)."""

    value: dict[str, Any]
    line: int


Reader = Callable[[BinaryIO, str, Problems], Iterator[Row]]


@dataclass(frozen=True)
class File:
    """One readable file: on disk, or a member of a ZIP archive.

    name: what to call it in messages
    suffix: decides the reader
    weight: how often its rows are seen in an epoch
    """

    path: Path
    name: str
    suffix: str
    member: str | None = None
    weight: float = 1.0

    @property
    def size(self) -> int:
        """Bytes, for progress."""
        return self.path.stat().st_size if self.member is None else 0

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its bytes."""
        if self.member is None:
            with self.path.open("rb") as file:
                yield file
        else:
            for name, inside in zip_members(self.path):
                if name == self.member:
                    yield inside
                    break

    def rows(self, problems: Problems) -> Iterator[Row]:
        """Read the file row by row."""
        try:
            with self.open() as file:
                yield from READERS[self.suffix](file, self.name, problems)
        except (OSError, FormatError) as error:
            problems.add(self.name, 0, f"cannot be read: {_reason(error)}", "Check that the file is whole.")


def _reason(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text[0].lower() + text[1:]


# -- readers ----------------------------------------------------------------------------------------------------------


def read_jsonl(file: BinaryIO, name: str, problems: Problems) -> Iterator[Row]:
    """One JSON object a line. A byte order mark, CRLF, blank lines and lines that begin with `#` are accepted."""
    for number, line in _lines(file, name, problems):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        value = parse_json(text, name, number, problems)
        if value is _BAD:
            continue
        if not isinstance(value, dict):
            problems.add(name, number, f"a row must be a JSON object, not {_kind(value)}", _ROW_ADVICE)
            continue
        yield Row(value, number)


def _lines(file: BinaryIO, name: str, problems: Problems) -> Iterator[tuple[int, str]]:
    """Lines of UTF-8 text with their numbers."""
    number = 0
    while not problems.enough:
        raw = file.readline(LONGEST_LINE + 1)
        if not raw:
            return
        number += 1
        if len(raw) > LONGEST_LINE:
            size = len(raw)
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(LONGEST_LINE)
                size += len(raw)
            problems.add(
                name,
                number,
                f"the line is {size / 1e6:,.0f} MB long; {LONGEST_LINE // 2**20} MiB are allowed",
                "Is the file one JSON array? Then name it *.json. Otherwise split the row.",
            )
            continue
        if number == 1:
            if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in raw[:64]:
                problems.add(name, 1, "the file is UTF-16 or binary, not UTF-8 text", "Save it as UTF-8.")
                return
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.add(
                name,
                number,
                f"byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8",
                "Save it as UTF-8.",
            )


_BAD = object()
_ROW_ADVICE = 'A row looks like {"messages": [{"role": "user", "content": "…"}, …]}.'


class _Refused(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key '{twice}' stands twice in one object")
    return value


def _constant(text: str) -> Any:
    raise _Refused(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def parse_json(text: str, name: str, number: int, problems: Problems) -> Any:
    """One JSON value, or `_BAD` after noting why not: syntax, duplicate keys, NaN, half a surrogate pair, nesting."""
    try:
        value = _DECODER.decode(text)
        if "\\u" in text or "\\U" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except _Refused as error:
        problems.add(
            name, number, str(error), "Keep one of them." if "twice" in str(error) else "Write null or a number."
        )
    except json.JSONDecodeError as error:
        advice = "The file may have been cut off." if error.pos >= len(text) - 1 else "Write one JSON object a line."
        where = (
            f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno} of the row"
        )
        problems.add(name, number, f"not valid JSON at {where}: {_reason(error.msg)}", advice)  # type: ignore[arg-type]
    except UnicodeEncodeError:
        problems.add(name, number, "a \\u escape is half of a surrogate pair", "Write the character itself, as UTF-8.")
    except RecursionError:
        problems.add(name, number, "nested too deeply", "Rows are a few levels deep.")
    except ValueError as error:
        problems.add(name, number, f"not valid JSON: {_reason(error)}", "Write one JSON object a line.")
    return _BAD


def read_json(file: BinaryIO, name: str, problems: Problems) -> Iterator[Row]:
    """A JSON array of objects, read element by element. An object that holds one such array is accepted too."""
    text = _Window(file, name, problems)
    try:
        first = text.peek()
        if first == "{":
            yield from _object_rows(text, name, problems)
            return
        if first != "[":
            what = "the file is empty" if not first else f"expected a JSON array, found {first!r}"
            problems.add(
                name, 1, what, "Write [ row, row, … ], or name the file *.jsonl when it has one object a line."
            )
            return
        text.take(1)
        number = 0
        while text.peek() not in ("]", ""):
            number += 1
            line = text.line
            value = text.value(_DECODER)
            if isinstance(value, dict):
                yield Row(value, line)
            else:
                problems.add(name, line, f"element {number} must be an object, not {_kind(value)}", _ROW_ADVICE)
            separator = text.peek()
            if separator == ",":
                text.take(1)
            elif separator != "]":
                raise json.JSONDecodeError("expected , or ]", "", 0)
        if text.peek() == "":
            problems.add(name, text.line, "the array is not closed", "The file may have been cut off.")
    except _Refused as error:
        problems.add(name, text.line, str(error), "Keep one of them.")
    except json.JSONDecodeError as error:
        problems.add(name, text.line, f"not valid JSON: {_reason(error.msg)}", "The file may have been cut off.")  # type: ignore[arg-type]
    except UnicodeDecodeError:
        problems.add(name, text.line, "the file is not UTF-8 text", "Save it as UTF-8.")
    except UnicodeEncodeError:
        problems.add(
            name, text.line, "a \\u escape is half of a surrogate pair", "Write the character itself, as UTF-8."
        )
    except RecursionError:
        problems.add(name, text.line, "nested too deeply", "Rows are a few levels deep.")


def _object_rows(text: _Window, name: str, problems: Problems) -> Iterator[Row]:
    """An object in a .json file: a data set under one key ({"data": [ … ]}), or JSONL by another name."""
    line = text.line
    value = text.value(_DECODER)
    arrays = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if text.peek() == "{" or set(value) & {"messages", "conversations", "prompt", "text", "instruction"}:
        yield Row(value, line)
        while text.peek() == "{":
            line = text.line
            yield Row(text.value(_DECODER), line)
        if text.peek():
            problems.add(name, text.line, f"expected another row, found {text.peek()!r}", "Write [ row, row, … ].")
    elif len(arrays) == 1:
        for row in value[arrays[0]]:
            if isinstance(row, dict):
                yield Row(row, line)
            else:
                problems.add(name, line, f"'{arrays[0]}' holds {_kind(row)}", _ROW_ADVICE)
    else:
        problems.add(name, line, "an object that is no row and holds no array of rows", "Write [ row, row, … ].")


class _Window:
    """A JSON text read piece by piece: what was parsed is dropped."""

    def __init__(self, file: BinaryIO, name: str, problems: Problems) -> None:
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self._text = ""
        self._at = 0
        self._ended = False
        self.line = 1

    def _more(self) -> bool:
        piece = "" if self._ended else self._file.read(1 << 20)
        if not piece:
            self._ended = True
            return False
        self._text, self._at = self._text[self._at :] + piece, 0
        return True

    def peek(self) -> str:
        """The next character that is no white space, or an empty string at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self.line += self._text[self._at] == "\n"
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, count: int) -> None:
        """Step over `count` characters."""
        self._at += count

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The next JSON value."""
        self.peek()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
                if end == len(self._text) and self._more():
                    continue  # a number may go on in the next piece
                break
            except json.JSONDecodeError as error:
                size = len(self._text) - self._at
                inside = error.pos < len(self._text) - 28 and not error.msg.startswith("Unterm")
                if size > LONGEST_LINE or inside:
                    raise
                if not self._more():
                    raise
        part = self._text[self._at : end]
        if "\\u" in part:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        self.line += part.count("\n")
        self._at = end
        return value


def read_csv(file: BinaryIO, name: str, problems: Problems, *, delimiter: str = ",") -> Iterator[Row]:
    """Comma-separated values with a header line. Cells of `messages`, `conversations` and `tools` hold JSON."""
    csv.field_size_limit(min(sys.maxsize, LONGEST_LINE))
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    number = 1
    try:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(reader, None)
        if header is None:
            return
        twice = sorted({key for key in header if header.count(key) > 1})
        if twice:
            problems.add(name, 1, f"the column '{twice[0]}' stands twice in the header", "Rename one of them.")
            return
        if "\x00" in "".join(header):
            problems.add(name, 1, "the file is UTF-16 or binary, not UTF-8 text", "Save it as UTF-8.")
            return
        number = reader.line_num + 1
        for cells in reader:
            if problems.enough:
                return
            if cells and len(cells) != len(header):
                what = f"{len(cells)} cells, but the header has {len(header)}"
                problems.add(name, number, what, "Put cells with commas or line breaks in quotes.")
            elif cells:
                row = dict(zip(header, cells, strict=True))
                if _decode_cells(row, name, number, problems):
                    yield Row(row, number)
            number = reader.line_num + 1
    except csv.Error as error:
        problems.add(
            name, number, f"not valid CSV: {_reason(error)}", "Close every quote, and double quotes inside cells."
        )
    except UnicodeDecodeError as error:
        problems.add(name, number, f"byte 0x{error.object[error.start]:02x} is not UTF-8", "Save it as UTF-8.")


def _decode_cells(row: dict[str, Any], name: str, number: int, problems: Problems) -> bool:
    for key in ("messages", "conversations", "conversation", "tools"):
        cell = row.get(key)
        if isinstance(cell, str) and cell.strip():
            row[key] = parse_json(cell, name, number, problems)
            if row[key] is _BAD:
                return False
        elif key in row and not cell:
            del row[key]
    return True


def read_tsv(file: BinaryIO, name: str, problems: Problems) -> Iterator[Row]:
    """Tab-separated values with a header line."""
    return read_csv(file, name, problems, delimiter="\t")


def read_text(file: BinaryIO, name: str, problems: Problems) -> Iterator[Row]:
    """Plain text or Markdown: the file is one document."""
    raw = file.read(LARGEST_TEXT + 1)
    if len(raw) > LARGEST_TEXT:
        problems.add(name, 0, f"longer than {LARGEST_TEXT // 2**20} MiB", "Split the text into several files.")
        return
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in raw[:4096]:
        problems.add(name, 1, "the file is UTF-16 or binary, not UTF-8 text", "Save it as UTF-8.")
        return
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.add(name, line, f"byte 0x{raw[error.start]:02x} is not UTF-8", "Save it as UTF-8.")
        return
    text = text.replace("\r\n", "\n")
    if text.strip():
        yield Row({"text": text}, 1)


def read_parquet(file: BinaryIO, name: str, problems: Problems) -> Iterator[Row]:
    """Parquet, batch by batch."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"{name}: reading Parquet needs pyarrow. Install it with `pip install 'mlxlora[parquet]'`."
        ) from None
    try:
        source = file if file.seekable() else io.BytesIO(file.read())
        number = 0
        for batch in parquet.ParquetFile(source).iter_batches(batch_size=1000):
            for value in batch.to_pylist():
                number += 1
                yield Row({key: item for key, item in value.items() if item is not None}, number)
            if problems.enough:
                return
    except (arrow.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        problems.add(name, 0, f"not a whole Parquet file: {_reason(error).splitlines()[0]}", "Write it again.")


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".md": read_text,
}

SPLITS = {
    "train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test", "eval": "test",
}  # fmt: skip


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


# -- places -----------------------------------------------------------------------------------------------------------


def find_files(path: Path, *, weight: float = 1.0) -> dict[str, list[File]]:
    """The files behind a path, by split (`train`, `valid`, `test`).

    A file, a ZIP archive, or a directory. Names like `train.jsonl` or `valid-00001.parquet` say the split; in a
    directory without them everything is training data. Raises DataError.
    """
    if not path.exists():
        near = _siblings(path)
        raise DataError(f"{path} does not exist.{near}")
    if path.is_dir():
        files = []
        for item in sorted(path.rglob("*")):
            inside = item.relative_to(path)
            if any(part.startswith(".") for part in inside.parts) or not item.is_file():
                continue
            if item.suffix.lower() in READERS:
                files.append(File(item, str(item), item.suffix.lower(), weight=weight))
            elif item.suffix.lower() == ".zip":
                files += _archive(item, weight)
        if not files:
            raise DataError(f"{path}: the directory holds no file that can be read ({_known()}).")
        return _by_split(files, path)
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return _by_split(_archive(path, weight), path)
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: files named *{path.suffix} are not known. Known are {_known()}.")
    return {"train": [File(path, str(path), path.suffix.lower(), weight=weight)]}


def _known() -> str:
    return ", ".join(f"*{suffix}" for suffix in [*READERS, ".zip"])


def _siblings(path: Path) -> str:
    from mlxlora.errors import nearest

    try:
        return nearest(path.name, [item.name for item in path.parent.iterdir()])
    except OSError:
        return ""


def _archive(path: Path, weight: float) -> list[File]:
    """The members of a ZIP archive that can be read, once the archive is known to be harmless. Nothing is unpacked."""
    files = []
    for member, _ in zip_members(path):
        inside = PurePosixPath(member)
        if inside.suffix.lower() in READERS and not any(part.startswith((".", "__")) for part in inside.parts):
            files.append(File(path, f"{path}!{member}", inside.suffix.lower(), member, weight))
    if not files:
        raise DataError(f"{path}: the archive holds no file that can be read ({_known()}).")
    return files


def _by_split(files: list[File], path: Path) -> dict[str, list[File]]:
    found: dict[str, list[File]] = {}
    named = [file for file in files if _split_of(file)]
    for file in named or files:
        found.setdefault(_split_of(file) or "train", []).append(file)
    if "train" not in found:
        have = ", ".join(sorted(found))
        raise DataError(f"{path}: there are files for {have}, but none for training (train.jsonl, …).")
    return found


def _split_of(file: File) -> str | None:
    inside = PurePosixPath((file.member or file.path.name).replace("\\", "/"))
    for word in (inside.name, *reversed(inside.parts[:-1])):
        for part in (word.split(".")[0], word.split("-")[0].split(".")[0], word.split("_")[0].split(".")[0]):
            if part.lower() in SPLITS:
                return SPLITS[part.lower()]
    return None
