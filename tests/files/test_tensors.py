"""safetensors: what we write, others read; what others wrote wrong, we refuse."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.errors import FormatError, InputError
from mlxlora.files import check_safetensors, load_safetensors, save_safetensors

TENSORS = {
    "weight": mx.arange(6, dtype=mx.float32).reshape(2, 3),
    "half": mx.array([1.5, -2.25, float("inf")], dtype=mx.bfloat16),
    "scalar": mx.array(7, dtype=mx.uint64),
    "empty": mx.zeros((0, 4)),
    "flag": mx.array([True, False, True]),
    "complex": mx.array([1 + 2j], dtype=mx.complex64),
    "transposed": mx.arange(6, dtype=mx.int16).reshape(2, 3).T,
}


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_round_trip_is_exact_and_independent_of_order(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a.safetensors", TENSORS, {"format": "mlx"})
    save_safetensors(tmp_path / "b.safetensors", dict(reversed(TENSORS.items())), {"format": "mlx"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_safetensors(tmp_path / "a.safetensors")
    assert set(loaded) == set(TENSORS)
    for name, expected in TENSORS.items():
        assert loaded[name].dtype == expected.dtype and loaded[name].shape == expected.shape
        if expected.size:
            assert mx.array_equal(loaded[name], expected).item()


def test_the_reference_library_reads_what_we_write(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    plain = {name: array for name, array in TENSORS.items() if name not in ("half", "complex")}
    save_safetensors(tmp_path / "a.safetensors", plain)
    for name, array in safetensors.load_file(tmp_path / "a.safetensors").items():
        np.testing.assert_array_equal(array, np.array(plain[name]))


def test_what_mlx_writes_passes(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "a.safetensors"), TENSORS)
    assert check_safetensors(tmp_path / "a.safetensors")["half"] == ("BF16", (3,))


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": tensor("F99")}, bytes(8), "a: dtype 'F99'"),
        ({"a": tensor("F64", (1,))}, bytes(8), "a: dtype 'F64'"),
        ({"a": tensor(shape=(-2,))}, bytes(8), "a: shape [-2]"),
        ({"a": tensor(shape=(2**40,))}, bytes(8), "a: shape"),
        ({"a": tensor(shape=(2**31 - 1, 2**31 - 1, 2**31 - 1))}, bytes(8), "a: F32"),
        ({"a": tensor(shape=(True,))}, bytes(8), "a: shape"),
        ({"a": tensor(shape=(2.0,))}, bytes(8), "a: shape"),
        ({"a": tensor(shape=(3,))}, bytes(8), "a: F32 [3] takes 12 bytes"),
        ({"a": tensor(offsets=(8, 0))}, bytes(8), "a: data_offsets [8, 0]"),
        ({"a": tensor(offsets=(-8, 0))}, bytes(8), "a: data_offsets"),
        ({"a": tensor(offsets=(8, 16))}, bytes(16), "a: begins at byte 8, expected 0"),
        ({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12), "b: begins at byte 4, inside"),
        ({"a": tensor()}, bytes(7), "a: ends at byte 8, but the file holds 7"),
        ({"a": tensor()}, bytes(9), "data: the tensors take 8 bytes, but the file holds 9"),
        ({"a": [1]}, b"", "a: expected an object"),
        ({"a": tensor() | {"more": 1}}, bytes(8), "a: expected an object"),
        ([1], b"", "not a JSON object"),
        (b'{"a":1,"a":1}', b"", "'a' occurs twice"),
        (b"{nope", b"", "not valid safetensors header"),
        (b"\xff\xfe", b"", "not UTF-8"),
        (b"[" * 100_000, b"", "nested too deeply"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__: expected an object of strings"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(FormatError) as caught:
        load_safetensors(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 100) + b"{}", struct.pack("<Q", 2**64 - 1)])
def test_a_file_too_short_for_its_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match="not a safetensors file"):
        check_safetensors(tmp_path / "bad.safetensors")


def test_no_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        check_safetensors(tmp_path / "none")
    with pytest.raises(InputError, match="is a directory"):
        check_safetensors(tmp_path)
