"""Memory of this process as Linux counts it, for what does not go through MLX."""

from __future__ import annotations

import ctypes
from pathlib import Path


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that this process has had in memory since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Let the peak start again from now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back(above: int) -> None:
    """Let the system have what was freed in this process, where it holds more than `above` bytes (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None and resident() > above:
        trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
