"""The two things that travel from data to the loss: one sample, and a batch of them.

T  tokens of one sample          B  rows of a batch
P  positions of a batch that predict a weighted token, padded to a few fixed sizes
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, tokenised.

    tokens:  int32 [T]
    weights: float32 [T]; `weights[i]` is the loss weight of predicting `tokens[i]` from what stands before it,
             so `weights[0]` is always 0
    origin:  `file:line`, or whatever names the row to its owner
    """

    tokens: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass sees.

    tokens:         int32 [B, T]; padding (on the right) is any valid id and never a target
    loss_positions: int32 [P]; flat indices into [B * T] of the hidden states that predict a weighted token, and 0,
                    as often as it takes, where P is padded: they need not differ
    targets:        int32 [P]; the token that each of them is to predict
    weights:        float32 [P]; 0 where P is padded
    segments:       int32 [B, T] or None; for packed rows the number of the document a token belongs to, counted from 0
                    in each row, and -1 for padding. None: one document a row
    samples:        indices of the samples in their data set, row by row (packed rows have several)
    """

    tokens: mx.array
    loss_positions: mx.array
    targets: mx.array
    weights: mx.array
    segments: mx.array | None = None
    samples: tuple[int, ...] = ()
