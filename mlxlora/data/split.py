"""Validation data, split off where none is given."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlxlora.data.dataset import Dataset

FEWEST = 10  # samples; smaller sets are not split


def split_validation(data: Dataset, share: float, most: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Keep a share of the samples for validation: at random, but fixed by `seed` and what the samples hold.

    Equal samples go to the same side. Sets of fewer than ten samples are not split.
    """
    if len(data) < FEWEST:
        return data, None
    wanted = min(most, max(1, round(len(data) * share)))
    drawn = _mixed(data.hashes, seed)
    highest = np.partition(drawn, wanted - 1)[wanted - 1]
    inside = drawn <= highest
    if inside.sum() > 2 * wanted:  # a sample with many copies stands at the edge
        inside = drawn < highest
    if not inside.any() or inside.all():
        return data, None
    return data.subset(np.flatnonzero(~inside)), data.subset(np.flatnonzero(inside))


def _mixed(hashes: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """A number for each hash that depends on every bit of it and of the seed (the finalizer of MurmurHash3)."""
    mixed = hashes ^ np.uint64(np.random.default_rng([seed & 0xFFFFFFFF, 0x5641]).integers(2**63))
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed ^= mixed >> np.uint64(33)
        mixed *= np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(33))
