"""Batched greedy decoding says what mlx-lm's own generator says, prompt by prompt."""

import mlx.core as mx

from mlxlora import mlxlm
from mlxlora.demo.decoding import greedy
from tests import tiny


def test_batches_agree_with_one_prompt_at_a_time() -> None:
    model = tiny.network("qwen3")
    prompts = [[5, 9, 30], [7, 7, 2, 60, 11], [40, 1, 3], [5, 9, 31], [12]]
    done: list[int] = []
    answers = greedy(model, prompts, end=tiny.VOCABULARY, max_tokens=12, on_done=done.append)
    assert sum(done) == len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = list(prompt)
        for token in answer:  # no cache, no batch: the whole text again for every token
            assert mx.argmax(model(mx.array([tokens]))[0, -1]).item() == token
            tokens.append(token)
        assert len(answer) == 12


def test_answers_stop_at_their_end() -> None:
    model = tiny.network("qwen3")
    prompts = [[5, 9, 30], [40, 1, 3], [5, 9, 31]]
    free = greedy(model, prompts, end=tiny.VOCABULARY, max_tokens=12)
    end = free[0][4]
    for whole, cut in zip(free, greedy(model, prompts, end=end, max_tokens=12), strict=True):
        assert cut == (whole[: whole.index(end)] if end in whole else whole)
    assert mlxlm.prompt_cache(model)[0].offset == 0
