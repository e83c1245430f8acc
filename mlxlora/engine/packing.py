"""Whether several documents can share a row with a model, and if not, why.

Most models can: attention is told who may see whom, and rotary positions are relative, so a document in the middle of
a row is computed as if it stood alone. What carries a state from token to token (Mamba, linear attention,
convolutions), counts positions from the start of the row, or changes with the length of the row, cannot. The first
two show when two documents are computed together and apart; the third shows at great length only, so it is looked up.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxlora.engine.anatomy import relative_error, tolerance
from mlxlora.engine.hold import own_class
from mlxlora.engine.masks import Layout, Steering

RECURRENT = ("conv1d", "conv", "ssm", "mamba", "mixer", "deltanet", "rglru", "rwkv", "linear_attn", "recurrent")


def packing_refusal(network: nn.Module) -> str | None:
    """Why rows of several documents would be computed wrong with this network; None if they are computed right."""
    steering = Steering(network)
    if not steering.asks:
        return "its attention masks cannot be steered: it asks mlx-lm for none"
    for path, module in network.named_modules():
        reason = _by_length(path, module)
        if reason:
            return reason
    together = mx.array([[7, 3, 5, 1, 4, 6, 2, 2, 3, 7, 1, 5, 4, 1, 6, 3]])
    segments = mx.array([[0] * 7 + [1] * 9])
    try:
        with steering.with_layout(Layout(linear=False, segments=segments)):
            packed = network(together)
        alone = mx.concatenate([network(together[:, :7]), network(together[:, 7:])], axis=1)
    except (ValueError, TypeError, AttributeError, IndexError) as failure:
        return f"it does not take a mask for packed documents ({failure})"
    if relative_error(packed, alone) <= tolerance(packed.dtype):
        return None
    if _is_recurrent(network):
        return "it carries a state from token to token, which documents in one row would share"
    return "its positions count from the start of the row, or its documents see each other"


def _by_length(path: str, module: nn.Module) -> str | None:
    name = own_class(module).__name__
    if name == "DynamicNTKScalingRoPE" or (name.endswith("RoPE") and getattr(module, "rope_type", "") == "dynamic"):
        return f"the rotary positions of {path} are scaled by the length of the row (dynamic NTK)"
    if getattr(module, "attn_temperature_tuning", False):
        return f"the attention of {path} is scaled by the position in the row (temperature tuning)"
    return None


def _is_recurrent(network: nn.Module) -> bool:
    names = {path.rsplit(".", 1)[-1].lower() for path, _ in network.named_modules()}
    return any(mark in name for name in names for mark in RECURRENT)
