"""How much memory a run may take: the machine's recommendation, a limit, and what running out of it says."""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections.abc import Iterator

import mlx.core as mx

from mlxlora.errors import ConfigError, TrainingError
from mlxlora.files import human_bytes

UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
SAFE_SHARE = 0.9  # of what the machine recommends: the rest of the desktop wants to live too


def parse_size(text: str) -> int:
    """Bytes of `12GB`, `900 MB`, `16GiB` or a plain number. Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|[kmgt]i?)b?\s*", text.lower())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1_000_000:
        raise ConfigError(f"memory_limit is '{text}'. Write a size above 1 MB such as 12GB or 900MB.")
    return size


def machine_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def recommended() -> int:
    """Bytes that MLX should use at most here: the recommended working set on Metal, the device's memory on CUDA, three
    quarters of the machine's on a CPU."""
    if mx.metal.is_available():
        return int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
    if mx.cuda.is_available():
        return int(mx.device_info(mx.gpu).get("total_memory", machine_memory()))
    return int(0.75 * machine_memory())


def collect_garbage() -> None:
    """Let go of what nobody can reach any more: it lies in memory, too, until Python happens to look for it."""
    for _ in range(3):  # what goes may have held on to more: MLX's graphs do
        if not gc.collect():
            return


def limit_of(memory_limit: str | None) -> int:
    """The limit in bytes: what was given, or a safe share of what the machine recommends."""
    return parse_size(memory_limit) if memory_limit else int(SAFE_SHARE * recommended())


@contextlib.contextmanager
def limited(size: int) -> Iterator[None]:
    """Hold MLX to `size` bytes within the block; afterwards its limits are what they were.

    Running out of memory becomes a TrainingError that says what to change.
    """
    memory = mx.set_memory_limit(size)
    cache = mx.set_cache_limit(size // 4)
    wired = mx.set_wired_limit(min(size, recommended())) if mx.metal.is_available() else None
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(
            r"allocate|out of memory|insufficient memory", str(error), re.I
        ):
            raise
        raise TrainingError(
            f"out of memory (limit {human_bytes(size)}). The last checkpoint is kept and the same command goes on from "
            "it. Take less at once: --training.batch_size 1, --samples.max_length lower, --training.checkpoint_blocks "
            "inputs, or a base model in 4 bits; --training.accumulate makes up for smaller batches."
        ) from error
    finally:
        mx.set_memory_limit(memory)
        mx.set_cache_limit(cache)
        if wired is not None:
            mx.set_wired_limit(wired)
        mx.clear_cache()
