"""What a run tells whoever watches it, and how the watcher tells it to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, TypeAlias

from mlxlora.errors import Signalled


@dataclass(frozen=True, slots=True)
class Data:
    """What the run learns from."""

    step: int
    samples: int
    validation_samples: int
    tokens: int
    trained_tokens: int
    shortest: int
    longest: int
    histogram_edges: list[int]
    """lengths at which the bars begin"""
    histogram_counts: list[int]


@dataclass(frozen=True, slots=True)
class Samples:
    """What the model answers to the same held-out prompts, now."""

    step: int
    prompts: list[str]
    answers: list[str]
    expected: list[str]
    """what the data says"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foretold:
    """What was found out before the run about its memory, its time and the settings that were left open."""

    predicted_peak: int = 0
    """bytes that the run will need at most, by forecast; 0 where none was made"""
    memory_limit: int = 0
    """bytes that it may take; 0 where there is no limit"""
    predicted_seconds: float = 0.0
    """how long the run will take from its first step, by forecast; 0 where none was made"""
    predicted_tokens_per_second: float = 0.0
    """processed tokens a second, by forecast"""
    chosen: str = ""
    """the settings of batches, checkpointing and the loss, in words"""
    why: str = ""
    """why these and nothing faster"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Foretold):
    """The run is prepared and the first step comes next."""

    step: int
    """steps done before: 0, or where a resumed run goes on"""
    steps: int
    epochs: float
    samples: int
    trainable_parameters: int
    total_parameters: int


@dataclass(frozen=True, slots=True)
class Step:
    """One update of the optimizer."""

    step: int
    steps: int
    epoch: float
    loss: float
    """mean over the trained tokens of the step"""
    learning_rate: float
    grad_norm: float
    tokens: int
    """trained tokens so far"""
    tokens_per_second: float
    """trained tokens a second, in this step"""
    processed_per_second: float
    """all tokens a second, padding left out"""
    samples: int
    """samples seen so far"""
    memory: int
    """bytes in use"""
    peak_memory: int
    """bytes, the most so far"""
    elapsed: float
    remaining: float
    """seconds, an estimate"""
    best_loss: float | None
    """the best validation loss so far"""
    applied: bool = True
    """False where the gradient was not finite and the update was left out"""


@dataclass(frozen=True, slots=True)
class Validation:
    """The loss on the validation set."""

    step: int
    epoch: float
    loss: float
    tokens: int
    best_loss: float | None
    """the best after any update, this one included"""
    best: bool
    """this one is the best so far"""
    elapsed: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint was published."""

    step: int
    path: Path
    best: bool


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person should know."""

    step: int
    message: str


Reason: TypeAlias = Literal["done", "stopped", "patience", "target_loss", "max_minutes"]


@dataclass(frozen=True, slots=True)
class Finished:
    """The run ended, and why. `stopped` can be resumed."""

    step: int
    epoch: float
    reason: Reason
    loss: float | None
    best_loss: float | None
    best_step: int | None
    elapsed: float
    peak_memory: int


Event: TypeAlias = Data | Samples | Started | Step | Validation | Checkpoint | Notice | Finished


def heeded() -> list[signal.Signals]:
    """The signals that end a command, but those that this process was told to ignore when it began."""
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in ending if signal.getsignal(number) != signal.SIG_IGN]


class Control:
    """The reins of a run: safe to use from a callback, another thread or a signal handler."""

    def __init__(self) -> None:
        self.stopping = False
        self.running = False
        """whether steps are being made, so that a stop has something to save"""
        self.signum: int | None = None
        self._save = threading.Event()

    def stop(self, signum: int | None = None) -> None:
        """Stop after the current step; what has been learned is saved."""
        self.stopping = True
        self.signum = signum

    def save(self) -> None:
        """Save a checkpoint after the current step."""
        self._save.set()

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked = self._save.is_set()
        self._save.clear()
        return asked

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within the block, SIGINT, SIGTERM and SIGHUP stop the run after its step, and save it.

        A second one, or one before the first step, raises Signalled at once. One that whoever began the process had it
        ignore (`nohup`) stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(signum: int, frame: FrameType | None) -> None:
            at_once = self.stopping or not self.running
            self.stop(signum)
            if at_once:
                raise Signalled(signum)

        before = {number: signal.signal(number, handle) for number in heeded()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
