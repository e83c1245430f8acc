"""What a model answers to a few held-out prompts: before, while and after it learns."""

from __future__ import annotations

import numpy as np

from mlxlora.data import Dataset
from mlxlora.generate import SamplingConfig, complete
from mlxlora.model import LanguageModel
from mlxlora.prompts import sample_prompt
from mlxlora.training.events import Samples

PROMPTS = 3
TOKENS = 64  # of an answer at most
LONGEST = 1024  # tokens of a sample that is asked about, where there are such: what stands before an answer is read too


class Answers:
    """Asks a model the same few prompts each time; greedily, so that only what it has learned makes a difference."""

    def __init__(self, model: LanguageModel, held_out: Dataset) -> None:
        self.model = model
        self.asked = [sample_prompt(model.tokenizer, held_out[position]) for position in chosen(held_out)]

    def __call__(self, step: int) -> Samples:
        """The event of a step: prompts, the answers of now, and what the data says."""
        return Samples(
            step=step,
            prompts=[prompt.text for prompt, _ in self.asked],
            answers=[
                complete(self.model, prompt, SamplingConfig(max_tokens=TOKENS)).text.strip() for prompt, _ in self.asked
            ],
            expected=[expected for _, expected in self.asked],
        )


def chosen(held_out: Dataset) -> list[int]:
    """The samples to ask about, spread evenly over those that are quickly read."""
    short = np.flatnonzero(held_out.lengths <= LONGEST)
    pool = short if len(short) else np.sort(np.argsort(held_out.lengths, kind="stable")[:PROMPTS])
    places = np.linspace(0, len(pool) - 1, min(PROMPTS, len(pool))).round().astype(np.int64)
    return [int(position) for position in pool[places]]
