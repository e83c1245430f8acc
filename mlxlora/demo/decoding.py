"""Greedy answers to many prompts at once, for scoring: prompts of one length share a batch and a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlxlora import mlxlm

ROWS = 64  # of one batch


def greedy(
    network: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    end: int,
    max_tokens: int = 64,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The likeliest next tokens of each prompt, up to `end` (left out) or `max_tokens`.

    Prompts of equal length are decoded together, so that nothing is padded and no mask is needed; a row that has
    ended goes on beside the others and what it says after its end is dropped. `on_done` is told how many more are done.
    """
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(index)
    answers: list[list[int]] = [[] for _ in prompts]
    for group in groups.values():
        for start in range(0, len(group), ROWS):
            members = group[start : start + ROWS]
            rows = _greedy_rows(network, [prompts[index] for index in members], end, max_tokens)
            for index, row in zip(members, rows, strict=True):
                answers[index] = row[: row.index(end)] if end in row else row
            if on_done:
                on_done(len(members))
    return answers


def _greedy_rows(network: nn.Module, prompts: Sequence[Sequence[int]], end: int, max_tokens: int) -> list[list[int]]:
    cache = mlxlm.prompt_cache(network)
    tokens = mx.array([list(prompt) for prompt in prompts])
    ended = mx.zeros(len(prompts), dtype=mx.bool_)
    steps: list[mx.array] = []
    for _ in range(max_tokens):
        chosen = mx.argmax(network(tokens, cache=cache)[:, -1], axis=-1)
        ended = ended | (chosen == end)
        steps.append(chosen)
        if mx.all(ended).item():
            break
        tokens = chosen[:, None]
    found: list[list[int]] = mx.stack(steps, axis=1).tolist()  # type: ignore[assignment]
    return found
