"""A data set as a stream of batches, epoch after epoch."""

from __future__ import annotations

from mlxlora.data.batches import EpochPlan, Planned, collate, plan_epoch
from mlxlora.data.config import BatchConfig
from mlxlora.data.dataset import Dataset
from mlxlora.data.sample import Batch


class Feed:
    """A data set as the training loop wants it: planned a whole epoch at a time, put together when it is needed."""

    def __init__(self, dataset: Dataset, config: BatchConfig, seed: int, *, shuffle: bool = True) -> None:
        self.dataset, self.config, self.seed, self.shuffle = dataset, config, seed, shuffle
        self._epoch = -1
        self._plan: EpochPlan | None = None

    @property
    def samples(self) -> int:
        """How many samples an epoch has."""
        return len(self.dataset)

    def plan(self, epoch: int) -> EpochPlan:
        """The batches of one epoch; a function of seed and epoch alone."""
        if self._plan is None or epoch != self._epoch:
            self._plan = plan_epoch(
                self.dataset.lengths, self.config, seed=self.seed, epoch=epoch, repeats=self.dataset.repeats,
                shuffle=self.shuffle,
            )  # fmt: skip
            self._epoch = epoch
        return self._plan

    def batch(self, planned: Planned) -> Batch:
        """The arrays of one batch."""
        return collate(self.dataset, planned)

    def tokens(self, planned: Planned) -> tuple[int, int]:
        """(trained, processed) tokens of one batch, padding left out."""
        chosen = list(planned.samples)
        return int(self.dataset.trained[chosen].sum()), int(self.dataset.lengths[chosen].sum())

    def origins(self, planned: Planned) -> list[str]:
        """file:line of the samples of one batch."""
        return [self.dataset.origin(index) for index in planned.samples]
