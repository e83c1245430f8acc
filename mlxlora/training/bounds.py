"""When a run ends before its last step, and what a person is told when its numbers go wrong."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from mlxlora.errors import TrainingError
from mlxlora.training.config import TrainingConfig
from mlxlora.training.contracts import Batches
from mlxlora.training.counters import Counters, Pending
from mlxlora.training.events import Reason

ENOUGH = 20  # losses, before a mean or a median of them says anything
HIGH, LONG = 2.0, 5  # a loss so many times its median, for so many steps in a row, is worth a word
NAMED = 20  # samples that an error names


def reached(config: TrainingConfig, counters: Counters, elapsed: float, *, validates: bool) -> Reason | None:
    """Which of the bounds that were set is reached.

    elapsed: seconds of training; validates: whether there is a validation set, by which a target is then measured
    """
    if config.patience is not None and counters.without_better >= config.patience:
        return "patience"
    if config.target_loss is not None:
        if validates:
            loss = counters.best_loss
        else:
            loss = statistics.fmean(counters.losses[-ENOUGH:]) if len(counters.losses) >= ENOUGH else None
        if loss is not None and loss <= config.target_loss:
            return "target_loss"
    if config.max_minutes is not None and elapsed >= 60 * config.max_minutes:
        return "max_minutes"
    return None


def refuse_nonfinite(pending: Pending, batches: Batches, config: TrainingConfig, skipped: int) -> None:
    """Raise TrainingError when more updates were left out than are allowed; `pending` is the last of them."""
    if skipped <= config.skip_nonfinite:
        return
    origins = [origin for planned in pending.planned for origin in batches.origins(planned)]
    shown = ", ".join(origins[:NAMED]) + (f" and {len(origins) - NAMED} more" if len(origins) > NAMED else "")
    raise TrainingError(
        f"step {pending.step}: the loss or its gradient is not a finite number. This update was not applied; "
        f"the last checkpoint is kept. The step saw: {shown}. Lower --optimizer.learning_rate, look at these "
        f"samples, or allow it with --training.skip_nonfinite N."
    )


@dataclass
class LossWatch:
    """Notices a loss that stands far above its usual level for long."""

    high: int = 0
    """steps in a row for which it does"""

    def look(self, loss: float, losses: list[float]) -> str | None:
        """What to say after a step with this loss, the last of `losses`; once for each time."""
        median = statistics.median(losses) if len(losses) >= ENOUGH else None
        self.high = self.high + 1 if median is not None and loss > HIGH * median else 0
        if self.high != LONG:
            return None
        return (
            f"the loss has been more than twice its running median ({median:.3f}) for {LONG} steps. "
            "The learning rate may be too high."
        )
