"""Rows out of files: one reader for each kind of file, one table.

A reader is a generator over an open binary file. It keeps one row in memory at a time, notes what it cannot read among
the problems and goes on with the next row where that is possible.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TextIO

from mlxlora.data.json_rows import BAD, LONGEST_LINE, ROW_ADVICE, Row, decoded, parse_json, read_json
from mlxlora.data.parquet_rows import read_parquet
from mlxlora.data.problems import Problems, kind_of, reason_of
from mlxlora.files import human_bytes

LARGEST_TEXT = 256 * 1024 * 1024  # bytes of one plain-text file: it is one document


Reader = Callable[[BinaryIO, str, Problems], Iterator[Row]]


# -- readers ----------------------------------------------------------------------------------------------------------


def read_jsonl(file: BinaryIO, name: str, problems: Problems) -> Iterator[Row]:
    """One JSON object a line. A byte order mark, CRLF, blank lines and lines that begin with `#` are accepted."""
    for number, line in _lines(file, name, problems):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        value = parse_json(text, name, number, problems)
        if value is BAD:
            continue
        if not isinstance(value, dict):
            problems.add(name, number, f"a row must be a JSON object, not {kind_of(value)}", ROW_ADVICE)
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
                f"the line is {human_bytes(size)} long; {human_bytes(LONGEST_LINE)} are allowed",
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


def read_csv(file: BinaryIO, name: str, problems: Problems, *, delimiter: str | None = None) -> Iterator[Row]:
    """Values separated by commas, or by the semicolons of many spreadsheets, below a header line.

    Cells of `messages`, `conversations` and `tools` hold JSON.
    """
    with decoded(file) as text:
        yield from _csv_rows(text, name, problems, delimiter)


def _csv_rows(text: TextIO, name: str, problems: Problems, delimiter: str | None) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)
    number = 1
    try:
        first = text.readline(LONGEST_LINE)
        delimiter = delimiter or (";" if ";" in first and "," not in first else ",")
        reader = csv.reader(itertools.chain([first] if first else [], text), delimiter=delimiter, strict=True)
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
            name, number, f"not valid CSV: {reason_of(error)}", "Close every quote, and double quotes inside cells."
        )
    except UnicodeDecodeError as error:
        problems.add(name, number, f"byte 0x{error.object[error.start]:02x} is not UTF-8", "Save it as UTF-8.")


def _decode_cells(row: dict[str, Any], name: str, number: int, problems: Problems) -> bool:
    for key in ("messages", "conversations", "conversation", "tools"):
        cell = row.get(key)
        if isinstance(cell, str) and cell.strip():
            row[key] = parse_json(cell, name, number, problems)
            if row[key] is BAD:
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
        problems.add(name, 0, f"longer than {human_bytes(LARGEST_TEXT)}", "Split the text into several files.")
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
