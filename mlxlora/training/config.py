"""How long to train, on how much at a time, and when to look, save and stop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mlxlora.data.config import BatchConfig, SamplesConfig
from mlxlora.errors import ConfigError

ROWS = 4  # samples of a micro-batch where nothing is said


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train, on how much at a time, and when to look, save and stop."""

    epochs: float | None = None
    """passes over the data; default 2 unless steps is given"""
    steps: int | None = None
    """updates of the optimizer, instead of epochs"""
    batch_size: int | None = None
    """samples a micro-batch; default 4 unless tokens_per_batch is given (where 4 do not fit, fewer, and as many more
    micro-batches a step)"""
    tokens_per_batch: int | None = None
    """tokens a micro-batch, padding included, instead of batch_size"""
    accumulate: int = 1
    """micro-batches a step; gradients are weighted by trained tokens, so this equals one batch of all of them"""
    checkpoint_blocks: bool | int | Literal["auto", "none", "products", "inputs"] = "auto"
    """gradient checkpointing: none (= false) keeps everything, products keeps matrix products, inputs (= true) keeps
    only the input of each block, a number keeps the products of so many upper blocks (at most all); auto keeps as many
    products as fit; where a step is one graph (a note says so), products and numbers are as inputs, and auto takes none
    where that fits"""
    loss_chunk: int | None = None
    """tokens whose logits exist at a time; default as many as suit vocabulary and memory"""
    validate_every: int | None = None
    """steps between validations; default once an epoch"""
    save_every: int | None = None
    """steps between checkpoints; default 100, and always at the end"""
    report_every: int = 1
    """steps between reports; between two of them the device is never waited for"""
    sample_every: int | None = None
    """steps between looks at what the model answers to a few held-out prompts; default before the first step and after
    the last; 0 for never"""
    keep: int = 2
    """how many checkpoints to keep"""
    seed: int = 0
    """of the adapter's initial weights, the order of samples and dropout"""
    patience: int | None = None
    """stop after so many validations in a row without a better loss"""
    target_loss: float | None = None
    """stop when the validation loss (without a validation set: the mean of the last 20 losses) is at most this"""
    max_minutes: float | None = None
    """stop after so many minutes of training, all sessions of a resumed run together"""
    skip_nonfinite: int = 0
    """how many steps with a loss or gradient that is not a number to leave out before giving up"""

    def __post_init__(self) -> None:
        def demand(good: bool, name: str, rule: str) -> None:
            if not good:
                raise ConfigError(f"training.{name} is {getattr(self, name)!r}, but must be {rule}.")

        for one, other in (("epochs", "steps"), ("batch_size", "tokens_per_batch")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ConfigError(f"training.{one} and training.{other} contradict each other. Give one of them.")
        demand(self.epochs is None or (math.isfinite(self.epochs) and 0 < self.epochs <= 10_000), "epochs", "above 0")
        for name in (
            "steps",
            "batch_size",
            "tokens_per_batch",
            "loss_chunk",
            "validate_every",
            "save_every",
            "patience",
        ):
            demand(getattr(self, name) is None or getattr(self, name) >= 1, name, "1 or more")
        kept = self.checkpoint_blocks
        demand(isinstance(kept, (bool, str)) or kept >= 1, "checkpoint_blocks", "1 or more where it is a number")
        demand(self.sample_every is None or self.sample_every >= 0, "sample_every", "0 or more")
        for name in ("accumulate", "report_every", "keep"):
            demand(getattr(self, name) >= 1, name, "1 or more")
        demand(0 <= self.seed < 2**63, "seed", "from 0 to below 2**63")
        demand(self.target_loss is None or self.target_loss > 0, "target_loss", "above 0")
        demand(self.max_minutes is None or self.max_minutes > 0, "max_minutes", "above 0")
        demand(self.skip_nonfinite >= 0, "skip_nonfinite", "0 or more")

    @property
    def blocks(self) -> int | Literal["auto", "none", "products", "inputs"]:
        """`checkpoint_blocks` with true and false spelled out."""
        if isinstance(self.checkpoint_blocks, bool):
            return "inputs" if self.checkpoint_blocks else "none"
        return self.checkpoint_blocks

    def batching(self, samples: SamplesConfig) -> BatchConfig:
        """How samples become batches under these settings."""
        return BatchConfig(
            batch_size=self.batch_size or ROWS,
            tokens_per_batch=self.tokens_per_batch,
            packing=samples.packing,
            max_length=samples.max_length,
        )
