"""safetensors files written a few rows at a time: every tensor says its size first and its bytes later."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxlora.files import write_json
from mlxlora.progress import Progress

SHARD_BYTES = 4 << 30
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to write. `data` is called when its turn comes, and yields its bytes row by row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], Iterable[bytes]]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * SIZES[self.dtype]


def write_shards(
    directory: Path, entries: Sequence[Entry], *, shard_bytes: int = SHARD_BYTES, on_progress: Progress | None = None
) -> None:
    """Write `model*.safetensors` and their index; nothing but the rows at hand is in memory."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in sorted(entries, key=lambda one: one.name):
        if size and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    total, done = sum(entry.nbytes for entry in entries), 0
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        alone = len(shards) == 1
        name = "model.safetensors" if alone else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (directory / name).open("wb") as file:
            file.write(header(shard))
            for entry in shard:
                start = file.tell()
                for data in entry.data():
                    file.write(data)
                    if on_progress is not None:
                        on_progress("writing weights", done + file.tell() - start, total)
                if file.tell() - start != entry.nbytes:
                    raise AssertionError(f"{entry.name}: wrote {file.tell() - start} bytes, announced {entry.nbytes}")
                done += entry.nbytes
        places |= {entry.name: name for entry in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(directory / "model.safetensors.index.json", index)


def header(shard: Sequence[Entry]) -> bytes:
    """The header of one file, padded so that the data is aligned."""
    described: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for entry in shard:
        offsets = [end, end + entry.nbytes]
        described[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        end += entry.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
