"""Validation data, split off where none is given."""

from __future__ import annotations

import numpy as np

from mlxlora.data.dataset import Dataset


def split_validation(data: Dataset, share: float, most: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Keep a share of the samples for validation, at random but fixed by `seed`.

    Equal samples go to the same side. Sets of fewer than ten samples are not split.
    """
    if len(data) < 10:
        return data, None
    wanted = min(most, max(1, round(len(data) * share)))
    _, group = np.unique(data.hashes, return_inverse=True)
    order = np.random.default_rng([seed & 0xFFFFFFFF, 0x5641]).permutation(int(group.max()) + 1)
    sizes = np.bincount(group)
    taken = np.cumsum(sizes[order]) <= wanted
    if not taken.any():
        taken[np.argmin(sizes[order])] = True
    chosen = np.zeros(len(sizes), bool)
    chosen[order[taken]] = True
    inside = chosen[group]
    if inside.all():
        return data, None
    return data.subset(np.flatnonzero(~inside)), data.subset(np.flatnonzero(inside))
