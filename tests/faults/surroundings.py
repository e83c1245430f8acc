"""What a process has around it that a library must not change: looked at before and after."""

from __future__ import annotations

import locale
import logging
import os
import random
import resource
import signal
import sys
import threading
import warnings
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def look() -> dict[str, Any]:
    """Limits, handlers, random states, classes: as values that can be compared and printed."""
    classes = [nn.Module, nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.RMSNorm]
    classes += [
        kind
        for name, module in sorted(sys.modules.items())
        if name.startswith("mlx_lm.models.") and module is not None
        for _, kind in sorted(vars(module).items())
        if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == name
    ]
    seeds: Any = mx.random.state
    return {
        "limits": {n: list(resource.getrlimit(getattr(resource, n))) for n in dir(resource) if n.startswith("RLIMIT_")},
        "signals": {s.name: str(signal.getsignal(s)) for s in signal.Signals},
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109
        "umask": (os.umask(0o22), os.umask(0o22))[1],
        "random": [str([key.tolist() for key in seeds]), str(random.getstate()), str(np.random.get_state())],
        "hooks": [str(sys.excepthook), str(sys.gettrace()), sys.getrecursionlimit(), str(threading.excepthook)],
        "logging": [str(logging.getLogger().handlers), logging.getLogger().level],
        "warnings": [str(entry) for entry in warnings.filters],
        "locale": str(locale.setlocale(locale.LC_ALL)),
        "path": list(sys.path),
        "device": str(mx.default_device()),
        "threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0,  # noqa: PTH208
        "classes": {f"{c.__module__}.{c.__qualname__}": [str(vars(c).get("__call__")), len(vars(c))] for c in classes},
        "memory": memory_limits(),
    }


def memory_limits() -> list[int]:
    """MLX's limits, which can only be read by setting them."""
    limits = []
    for change in (mx.set_memory_limit, mx.set_cache_limit):
        before = change(1 << 40)
        change(before)
        limits.append(before)
    return limits
