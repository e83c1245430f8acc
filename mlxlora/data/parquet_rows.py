"""Parquet: a few rows at a time, measured before they are made.

A text that stands often is stored once, and rows refer to it: a file of a kilobyte may hold one text of megabytes for
each of a million rows, or a million times in the messages of one. Where a row may hold many texts they are looked at
as references first, and where one would be too long all rows of its group are made from references.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from mlxlora.data.json_rows import LONGEST_LINE, Row
from mlxlora.data.problems import Problems, reason_of
from mlxlora.errors import DataError
from mlxlora.files import human_bytes

ROWS = 4  # made at a time
LARGE = 1 << 30  # bytes: larger columns are not looked at first,
RATIO = 200  # and where they are packed into so many times fewer, they were made to fill the memory


def read_parquet(file: BinaryIO, name: str, problems: Problems) -> Iterator[Row]:
    """The rows of a Parquet file."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"{name}: reading Parquet needs pyarrow. Install it with `pip install 'mlxlora[parquet]'`."
        ) from None
    try:
        source = file if file.seekable() else io.BytesIO(file.read())
        about = parquet.read_metadata(source)
        _refuse_blown_up(about)
        number = 0
        for part in _parts(source, about, arrow):
            size = _decoded_bytes(part, arrow) if part.num_rows == 1 else 0
            if size > LONGEST_LINE:
                number += 1
                what = f"the row is {human_bytes(size)} long; {human_bytes(LONGEST_LINE)} are allowed"
                problems.add(name, number, what, "Split it.")
            else:
                for value in part.to_pylist():
                    number += 1
                    yield Row({key: item for key, item in value.items() if item is not None}, number)
            if problems.enough:
                return
    except (arrow.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        problems.add(name, 0, f"not a whole Parquet file: {reason_of(error).splitlines()[0]}", "Write it again.")


def _parts(source: BinaryIO, about: Any, arrow: Any) -> Iterator[Any]:
    """The rows, a few together where they are short, else one by one."""
    import pyarrow.parquet as parquet

    columns = [about.schema.column(index) for index in range(about.num_columns)]
    texts = [column for column in columns if column.physical_type == "BYTE_ARRAY"]
    repeated = [column.path for column in texts if column.max_repetition_level > 0]
    referring = parquet.ParquetFile(source, metadata=about, read_dictionary=[column.path for column in texts])
    plain = parquet.ParquetFile(source, metadata=about)
    for group in range(about.num_row_groups):
        if repeated and _has_long_row(referring, group, repeated, arrow):
            batches = referring.read_row_group(group).combine_chunks().to_batches(max_chunksize=ROWS)
        else:
            batches = plain.iter_batches(batch_size=ROWS, row_groups=[group])
        for batch in batches:
            if _decoded_bytes(batch, arrow) <= LONGEST_LINE:
                yield batch
            else:
                yield from (batch.slice(index, 1) for index in range(batch.num_rows))


def _has_long_row(file: Any, group: int, repeated: list[str], arrow: Any) -> bool:
    """Whether a row of the group is longer than allowed, or may be, by the texts that it can hold many of."""
    row_group = file.metadata.row_group(group)
    if row_group.total_byte_size > LARGE:
        return False
    waiting = file.read_row_group(group, columns=repeated).combine_chunks().to_batches()
    while waiting:
        rows = waiting.pop()
        if _decoded_bytes(rows, arrow) > LONGEST_LINE:
            if rows.num_rows == 1:
                return True
            half = rows.num_rows // 2
            waiting += [rows.slice(0, half), rows.slice(half)]
    return False


def _refuse_blown_up(about: Any) -> None:
    """Raise ValueError for a file whose pages would be beyond all measure when they are unpacked."""
    for group in range(about.num_row_groups):
        row_group = about.row_group(group)
        for column in (row_group.column(index) for index in range(row_group.num_columns)):
            size = column.total_uncompressed_size
            if size > LARGE and size > RATIO * max(column.total_compressed_size, 1):
                raise ValueError(
                    f"{human_bytes(size)} of the column {column.path_in_schema} are packed into "
                    f"{human_bytes(column.total_compressed_size)}"
                )


def _decoded_bytes(values: Any, arrow: Any) -> int:
    """Bytes of a batch or an array when every reference is followed."""
    if isinstance(values, arrow.RecordBatch):
        return sum(_decoded_bytes(column, arrow) for column in values.columns)
    kinds, kind = arrow.types, values.type
    if not _refers(kind, arrow):
        return int(values.nbytes)
    if kinds.is_dictionary(kind):
        return _referred_bytes(values, arrow)
    if kinds.is_map(kind):
        first, last = values.offsets[0].as_py(), values.offsets[-1].as_py()
        inside = [part.slice(first, last - first) for part in (values.keys, values.items)]
        return 4 * len(values) + sum(_decoded_bytes(part, arrow) for part in inside)
    if kinds.is_struct(kind):
        return len(values) // 8 + sum(_decoded_bytes(field, arrow) for field in values.flatten())
    return 4 * len(values) + _decoded_bytes(values.flatten(), arrow)  # a list


def _refers(kind: Any, arrow: Any) -> bool:
    """Whether values of this type hold references."""
    inside = (kind.field(index).type for index in range(kind.num_fields))
    return bool(arrow.types.is_dictionary(kind)) or any(_refers(part, arrow) for part in inside)


def _referred_bytes(values: Any, arrow: Any) -> int:
    """The same of references into a dictionary."""
    import pyarrow.compute as compute

    kinds, kind = arrow.types, values.type.value_type
    texts = (kinds.is_string, kinds.is_large_string, kinds.is_binary, kinds.is_large_binary)
    if not any(is_one(kind) for is_one in texts):
        widest = max(
            (_decoded_bytes(values.dictionary.slice(at, 1), arrow) for at in range(len(values.dictionary))), default=0
        )
        return len(values) * widest
    lengths = compute.binary_length(values.dictionary).cast(arrow.int64())
    return int(values.indices.nbytes) + int(compute.sum(lengths.take(values.indices)).as_py() or 0)
