"""Where batches end and how long their rows are: little padding, few lengths, hardly more batches than needed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlxlora.data.config import BatchConfig

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]

PADDING = 0.03  # share of padding that rounding up to a row length may cost
FINE = 0.01  # the same where there are so few batches that most have a length of their own
MOST_PADDING = 0.045  # share of padding from which on batches are cut with more care
WORK = 200_000_000  # steps that this may cost: about a second. Pools so large have neighbours for rows of all lengths


def row_lengths(lengths: IntArray, count: int, *, padding: float = PADDING) -> IntArray:
    """The fewest row lengths that keep padding below `padding`, and at most `count`; ascending.

    Dynamic programming over the histogram: few lengths mean few shapes to compile, the right ones mean little padding.
    """
    if not len(lengths):
        return np.zeros(0, np.int32)
    grain = -(-int(lengths.max()) // 512)  # at most 512 candidates
    sizes, samples = np.unique(-(-lengths.astype(np.int64) // grain) * grain, return_counts=True)
    if len(sizes) <= count:
        return sizes.astype(np.int32)
    many = np.concatenate([[0], np.cumsum(samples)])
    # cost[i, j]: padded tokens when the sizes from i up to and with j all take length sizes[j]
    cost = (many[None, 1:] - many[:-1, None]) * sizes[None, :]
    cost = np.where(np.arange(len(sizes))[:, None] <= np.arange(len(sizes))[None, :], cost, np.iinfo(np.int64).max // 4)
    best = cost[0]
    choices = []
    for _ in range(count - 1):
        if best[-1] * (1 - padding) <= lengths.sum(dtype=np.int64):
            break
        total = np.concatenate([[0], best[:-1]])[:, None] + cost
        choice = total.argmin(axis=0)
        choices.append(choice)
        best = total[choice, np.arange(len(sizes))]
    ends, last = [], len(sizes) - 1
    for choice in reversed(choices):
        ends.append(last)
        last = int(choice[last]) - 1
        if last < 0:
            break
    if last >= 0:
        ends.append(last)
    return sizes[sorted(ends)].astype(np.int32)


def cut(padded: IntArray, tokens: int, config: BatchConfig) -> list[int]:
    """Where the batches of a pool end whose rows are about sorted.

    As few batches as can be; where that wastes too much (a few long rows beside shorter ones), up to an eighth more.
    """
    limit = config.tokens_per_batch
    ends, begin, longest, spent = [], 0, 0, 0
    for end, length in enumerate(padded.tolist()):
        longer = max(longest, length)
        count = end - begin
        if count and (count == config.batch_size if limit is None else (count + 1) * longer > limit):
            ends.append(end)
            spent += count * longest
            begin, longer = end, length
        longest = longer
    ends += [len(padded)] if len(padded) else []
    spent += (len(padded) - begin) * longest
    most = len(ends) + -(-len(ends) // 8)
    rows = config.batch_size if limit is None else limit // max(1, int(padded.min(initial=limit)))
    if spent * (1 - MOST_PADDING) <= tokens or len(padded) * rows * most > WORK:
        return ends
    return best_cut(padded, config, most, int(tokens / (1 - MOST_PADDING)))


def best_cut(padded: IntArray, config: BatchConfig, most: int, enough: int) -> list[int]:
    """Where the batches of a pool end: the fewest that take at most `enough` tokens, or `most` of them.

    Dynamic programming over the number of batches: cost[j] is the least that the first j rows take in so many batches.
    """
    N, unreachable, limit = len(padded), np.iinfo(np.int64).max // 2, config.tokens_per_batch
    largest = N if limit is not None else min(N, config.batch_size)
    spans = []  # by the number of rows: what a batch of so many takes that ends with this row
    longest = padded.astype(np.int64)
    for count in range(1, largest + 1):
        if count > 1:
            longest = np.maximum(longest[1:], padded[: N + 1 - count])
        spent = longest * count
        if limit is not None and count > 1:
            spent[spent > limit] = unreachable
            if (spent == unreachable).all():
                break
        spans.append(spent)
    cost = np.full(N + 1, unreachable)
    cost[0] = 0
    taken: list[LongArray] = []  # rows of the last batch, by the number of batches and of rows
    while cost[N] > enough and len(taken) < most:
        best, rows = np.full(N + 1, unreachable), np.zeros(N + 1, np.int64)
        for count, spent in enumerate(spans, 1):
            total = cost[: N + 1 - count] + spent
            better = np.flatnonzero(total < best[count:]) + count
            best[better], rows[better] = total[better - count], count
        cost = best
        taken.append(rows)
    ends, end = [], N
    for rows in reversed(taken):
        ends.append(end)
        end -= int(rows[end])
    return ends[::-1]
