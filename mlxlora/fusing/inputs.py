"""What layers see: the second moment of their inputs over calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxlora.adapters import weights
from mlxlora.adapters.inject import get_module
from mlxlora.adapters.layer import Wrapper, base_of
from mlxlora.fusing.divergence import replaced
from mlxlora.fusing.rounding import Array

BYTES = 512 << 20  # of moments held at once; more layers mean more passes over the text


class _Recorder(Wrapper):
    """Stands around a layer and adds up x xᵀ over everything that the layer multiplies with."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__(layer)
        object.__setattr__(self, "moment", mx.zeros((width, width)))
        object.__setattr__(self, "count", 0)

    def record(self, x: mx.array) -> None:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        object.__setattr__(self, "moment", self.moment + rows.T @ rows)
        object.__setattr__(self, "count", self.count + rows.shape[0])

    def adapted(self) -> mx.array:
        return self.base.adapted() if isinstance(self.base, Wrapper) else weights.dense(self.base)

    def changes(self) -> bool:
        return isinstance(self.base, Wrapper) and self.base.changes()

    def __call__(self, x: mx.array, *arguments: Any, **named: Any) -> Any:
        # looking up embeddings multiplies with nothing, and the keys of MLA with columns instead of rows
        if mx.issubdtype(x.dtype, mx.floating) and named.get("transpose", True):
            self.record(x)
        return self.base(x, *arguments, **named)

    def as_linear(self, x: mx.array) -> Any:
        self.record(x)
        return self.base.as_linear(x)


def moments(network: nn.Module, paths: Sequence[str], rows: Sequence[list[int]]) -> Iterator[tuple[str, Array | None]]:
    """For each module its H = mean of x xᵀ [C, C], or None for one that saw no input to multiply with.

    As many layers at a time as `BYTES` has room for; the network is as it was after each.
    """
    for group in _groups(network, paths):
        recorders = {path: _Recorder(get_module(network, path), width) for path, width in group.items()}
        with replaced(network, dict(recorders)):
            for row in rows:
                network(mx.array([row]))
                mx.eval([recorder.moment for recorder in recorders.values()])
        for path in list(recorders):
            recorder = recorders.pop(path)
            count: int = recorder.count
            yield path, np.array(recorder.moment / count, np.float32) if count else None
        mx.clear_cache()


def _groups(network: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, int]]:
    group: dict[str, int] = {}
    size = 0
    for path in paths:
        width = weights.shape(base_of(get_module(network, path)))[-1]
        if group and size + 4 * width * width > BYTES:
            yield group
            group, size = {}, 0
        group[path] = width
        size += 4 * width * width
    if group:
        yield group
