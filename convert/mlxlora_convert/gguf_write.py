"""A GGUF file written a few rows at a time: header first, then every tensor as it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora.progress import Progress
from mlxlora_convert.gguf_header import ALIGNMENT
from mlxlora_convert.gguf_metadata import Values
from mlxlora_convert.gguf_tensors import Planned, block_size, encoded, ggml_type
from mlxlora_convert.gguf_tokens import Vocabulary


@dataclass(frozen=True, slots=True)
class Written:
    """How much was written: bytes, and how many tensors kept MLX's own quantization bit for bit."""

    bytes: int
    kept: int


def write_file(
    path: Path,
    architecture: str,
    values: Values,
    vocabulary: Vocabulary | None,
    tensors: Sequence[Planned],
    on_progress: Progress | None = None,
) -> Written:
    """Write a GGUF file. Of the tensors, a chunk of rows is in memory at a time."""
    from gguf import GGUFWriter

    writer: Any = GGUFWriter(path, architecture)
    for key, (kind, value) in values.items():
        getattr(writer, f"add_{kind}")(key, value)
    if vocabulary is not None:
        add_vocabulary(writer, vocabulary)
    for one in tensors:
        block, size = block_size(one.type)
        shape = (*one.shape[:-1], one.shape[-1] // block * size)  # in bytes, as the writer wants it
        writer.add_tensor_info(one.name, shape, np.dtype(np.uint8), one.nbytes, raw_dtype=ggml_type(one.type))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        kept = write_tensors(writer.fout[0], tensors, on_progress)
    finally:
        writer.close()
    return Written(path.stat().st_size, kept)


def write_tensors(file: Any, tensors: Sequence[Planned], on_progress: Progress | None) -> int:
    """The data after the header: every tensor at the next multiple of the alignment. Returns how many were kept."""
    total = sum(one.nbytes for one in tensors)
    done = kept = 0
    file.write(bytes(-file.tell() % ALIGNMENT))
    for one in tensors:
        length, all_kept = 0, True
        for data, same in encoded(one):
            file.write(data)
            length, all_kept = length + len(data), all_kept and same
            if on_progress is not None:
                on_progress("writing tensors", done + length, total)
        if length != one.nbytes:
            raise AssertionError(f"{one.name}: wrote {length} bytes, announced {one.nbytes}")
        file.write(bytes(-length % ALIGNMENT))
        done, kept = done + length, kept + all_kept
    return kept


def add_vocabulary(writer: Any, found: Vocabulary) -> None:
    """The tokenizer's keys. Token types must be int32: llama.cpp refuses others."""
    prefix = "tokenizer.ggml"
    writer.add_string(f"{prefix}.model", found.model)
    writer.add_string(f"{prefix}.pre", found.pre)
    writer.add_token_list(found.tokens)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    writer.add_token_types(found.types)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    for name, number in found.ids.items():
        writer.add_uint32(f"{prefix}.{name}", number)
    for name, flag in found.flags.items():
        writer.add_bool(f"{prefix}.{name}", flag)
    templates = dict(found.templates)
    if not templates:
        return
    first = "default" if "default" in templates else next(iter(templates))
    writer.add_string("tokenizer.chat_template", templates.pop(first))
    if templates:
        writer.add_array("tokenizer.chat_templates", list(templates))
    for name, text in templates.items():
        writer.add_string(f"tokenizer.chat_template.{name}", text)
