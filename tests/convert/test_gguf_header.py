"""GGUF headers that lie, and every way of cutting one short: always a FormatError, never a crash."""

import itertools
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxlora.errors import FormatError
from mlxlora_convert.gguf_header import read_header

F32, Q8_0 = 0, 8


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(name: str, dims: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    shape = struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + struct.pack("<I", len(dims)) + shape + struct.pack("<IQ", kind, offset)


def build(
    *,
    keys: list[bytes] | None = None,
    entries: list[bytes] | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 256,
    alignment: int = 32,
) -> bytes:
    keys = [text("general.architecture") + struct.pack("<I", 8) + text("llama")] if keys is None else keys
    entries = [entry("a", (8, 2)), entry("b", (8,), offset=64)] if entries is None else entries
    number, many = counts or (len(entries), len(keys))
    head = magic + struct.pack("<IQQ", version, number, many) + b"".join(keys) + b"".join(entries)
    return head + bytes(-len(head) % alignment) + bytes(data)


def test_a_good_file_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    from gguf import GGUFReader, GGUFWriter

    path = tmp_path / "good.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_array("some.strings", ["a", "ü", ""])
    writer.add_array("some.numbers", [1, -2, 3])
    writer.add_float32("some.float", 0.25)
    writer.add_bool("some.flag", True)
    writer.add_tensor("first", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("second", np.arange(8, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    assert header.architecture == "llama" and header.metadata["some.float"] == 0.25
    assert header.metadata["some.strings"] == ["a", "ü", ""] and header.metadata["some.flag"] is True
    assert header.metadata["some.numbers"].tolist() == [1, -2, 3]
    for theirs in GGUFReader(path).tensors:
        ours = header.tensors[theirs.name]
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
        assert ours.shape == tuple(int(size) for size in reversed(theirs.shape))


KEY = text("k") + struct.pack("<I", 4) + struct.pack("<I", 1)
ARRAY = struct.pack("<I", 9)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"magic": b"GGML"}, "is no GGUF file"),
    "big-endian magic": ({"magic": b"FUGG"}, "big-endian"),
    "version 1": ({"version": 1}, "expected 2 or 3"),
    "version 4": ({"version": 4}, "expected 2 or 3"),
    "big-endian version": ({"version": 3 << 24}, "big-endian"),
    "more tensors than bytes": ({"counts": (2**40, 1)}, "do not fit"),
    "more keys than bytes": ({"counts": (2, 2**61)}, "do not fit"),
    "one tensor too many": ({"counts": (3, 1), "data": 0}, "GGUF header"),
    "key twice": ({"keys": [KEY, KEY]}, "k: stands in the metadata twice"),
    "empty key": ({"keys": [text("") + struct.pack("<II", 4, 1)]}, "0 bytes long"),
    "key not UTF-8": ({"keys": [text(b"\xff\xfe") + struct.pack("<II", 4, 1)]}, "not UTF-8"),
    "value not UTF-8": ({"keys": [text("k") + struct.pack("<I", 8) + text(b"\xff")]}, "k: not UTF-8"),
    "unknown value type": ({"keys": [text("k") + struct.pack("<II", 77, 1)]}, "unknown metadata type 77"),
    "unknown element type": ({"keys": [text("k") + ARRAY + struct.pack("<IQ", 77, 1)]}, "metadata type 77"),
    "boolean of 2": ({"keys": [text("k") + struct.pack("<IB", 7, 2)]}, "neither 0 nor 1"),
    "string longer than the file": ({"keys": [text("k") + struct.pack("<IQ", 8, 2**62)]}, "do not fit"),
    "array longer than the file": ({"keys": [text("k") + ARRAY + struct.pack("<IQ", 4, 2**62)]}, "do not fit"),
    "array of strings longer than the file": ({"keys": [text("k") + ARRAY + struct.pack("<IQ", 8, 2**60)]}, "fit"),
    "array nested without end": (
        {"keys": [text("k") + ARRAY + struct.pack("<IQ", 9, 1) * 40 + struct.pack("<IQI", 4, 1, 1)]}, "nested more",
    ),
    "alignment zero": ({"keys": [text("general.alignment") + struct.pack("<II", 4, 0)]}, "power of two"),
    "alignment 48": ({"keys": [text("general.alignment") + struct.pack("<II", 4, 48)]}, "power of two"),
    "alignment a string": ({"keys": [text("general.alignment") + struct.pack("<I", 8) + text("32")]}, "power of two"),
    "one part of several": ({"keys": [text("split.count") + struct.pack("<IH", 2, 3)]}, "split.count"),
    "no dimensions": ({"entries": [entry("a", ())]}, "0 dimensions"),
    "nine dimensions": ({"entries": [entry("a", (1,) * 9)]}, "9 dimensions"),
    "zero in the shape": ({"entries": [entry("a", (8, 0))]}, "impossible shape"),
    "shape that overflows": ({"entries": [entry("a", (2**32, 2**32))]}, "impossible shape"),
    "negative dimension": ({"entries": [entry("a", (2**64 - 8,))]}, "impossible shape"),
    "tensor twice": ({"entries": [entry("a", (8,)), entry("a", (8,), offset=64)]}, "a: stands in the file twice"),
    "unknown tensor type": ({"entries": [entry("a", (8,), 999)]}, "a: unknown tensor type 999"),
    "half a block": ({"entries": [entry("a", (40,), Q8_0)]}, "expected a multiple of 32 for type Q8_0"),
    "offset not aligned": ({"entries": [entry("a", (8,), offset=8)]}, "expected a multiple of 32"),
    "offset outside": ({"entries": [entry("a", (8,), offset=2**40)]}, "the file ends at"),
    "offset that wraps": ({"entries": [entry("a", (8,), offset=2**64 - 32)]}, "the file ends at"),
    "tensor beyond the end": ({"entries": [entry("a", (1024,))]}, "the file ends at"),
    "tensors overlapping": ({"entries": [entry("a", (32,)), entry("b", (8,), offset=64)]}, "b: overlaps a"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_header_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    settings, expected = WRONG[name]
    path = tmp_path / "wrong.gguf"
    path.write_bytes(build(**settings))
    with pytest.raises(FormatError, match=expected):
        read_header(path)


def test_all_wrong_tensors_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wrong.gguf"
    path.write_bytes(build(entries=[entry("a", (8,), 999), entry("b", (8,), offset=8), entry("c", (8,), offset=2**30)]))
    with pytest.raises(FormatError) as raised:
        read_header(path)
    assert [problem.where for problem in raised.value.problems] == ["a", "b", "c"]


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole, path = build(data=96), tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            read_header(path)
    path.write_bytes(whole)
    assert set(read_header(path).tensors) == {"a", "b"}


def test_mutations_never_crash_and_never_leave_the_file(tmp_path: Path) -> None:
    whole, path, random_ = build(), tmp_path / "mutated.gguf", random.Random(0)
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(random_.randint(1, 4)):
            data[random_.randrange(len(data) - 256)] = random_.choice((0, 1, 2, 127, 128, 255, random_.randrange(256)))
        path.write_bytes(data)
        try:
            header = read_header(path)
        except FormatError:
            continue
        spans = sorted((tensor.offset, tensor.offset + tensor.nbytes) for tensor in header.tensors.values())
        assert all(start >= 24 and stop <= len(data) for start, stop in spans)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(FormatError, match="is not a file"):
        read_header(tmp_path)
