"""Options of `--to mlx`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MlxOptions:
    """How adapters are folded in; see `mlxlora fuse`."""

    dequantize: bool = False
    """store the whole model unquantized"""
    bits: int | None = None
    """store the adapted layers in so many bits"""
    max_kl: float = 0.01
    """how far the result may be from the adapter on its base, in nats a token"""
