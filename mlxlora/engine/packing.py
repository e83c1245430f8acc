"""Several documents in one row: whether a model computes them right, and a padded batch made into such a row.

Most models can: attention is told who may see whom, and rotary positions are relative, so a document in the middle of
a row is computed as if it stood alone. What carries a state from token to token (Mamba, linear attention,
convolutions), counts positions from the start of the row, or changes with the length of the row, cannot. The first
two show when two documents are computed together and apart; the third shows at great length only, so it is looked up.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxlora.data.sample import Batch
from mlxlora.engine.anatomy import relative_error
from mlxlora.engine.hold import own_class
from mlxlora.engine.masks import Layout, Steering
from mlxlora.engine.precision import beyond_rounding

GRAIN = 8  # lengths of rows laid end to end are multiples of this
TRACED_GRAIN = 64  # and of this, or of a sixteenth to a thirty-second, where each length is another trace
WORTH_IT = 1 / 16  # the share of padding that is worth a mask
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

    def compare() -> float:
        with steering.with_layout(Layout(linear=False, segments=segments)):
            packed = network(together)
        return relative_error(packed, mx.concatenate([network(together[:, :7]), network(together[:, 7:])], axis=1))

    try:
        error = beyond_rounding(network, network(together).dtype, compare)
    except (ValueError, TypeError, AttributeError, IndexError) as failure:
        return f"it does not take a mask for packed documents ({failure})"
    if error is None:
        return None
    if _is_recurrent(network):
        return "it carries a state from token to token, which documents in one row would share"
    return "its positions count from the start of the row, or its documents see each other"


def end_to_end(batch: Batch, *, traced: bool) -> Batch:
    """The batch with its rows laid end to end in a single one, if that leaves out enough padding; else as it is.

    A row ends with its last scored position: what stands behind it is seen by nobody. Looks at what the data loader
    has made; nothing in flight is waited for. Where steps are `traced`, the length is rounded so that one trace serves
    many batches.
    """
    rows, length = batch.tokens.shape
    places = np.array(batch.loss_positions)
    row, column = np.divmod(places, length)
    lengths = np.zeros(rows, np.int64)
    np.maximum.at(lengths, row, column + 1)
    total = int(lengths.sum())
    grain = max(TRACED_GRAIN, 1 << max(0, total.bit_length() - 5)) if traced else GRAIN
    total = -(-total // grain) * grain
    if computed(total, rows * length) == rows * length:
        return batch
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens, segments = np.zeros((1, total), np.int32), np.full((1, total), -1, np.int32)
    for number, given in enumerate(np.array(batch.tokens)):
        tokens[0, offsets[number] : offsets[number + 1]] = given[: lengths[number]]
        segments[0, offsets[number] : offsets[number + 1]] = number
    positions = mx.array((offsets[row] + column).astype(np.int32))
    return replace(batch, tokens=mx.array(tokens), loss_positions=positions, segments=mx.array(segments))


def computed(tokens: npt.ArrayLike, padded: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """How many tokens are computed of batches of so many, and so many with padding, where rows are laid end to end."""
    return np.where(np.less_equal(tokens, np.multiply(padded, 1 - WORTH_IT)), tokens, padded).astype(np.int64)


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
