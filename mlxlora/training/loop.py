"""The training loop: a generator of events over an engine, an objective, batches and an optimizer.

It knows neither files nor formats and prints nothing. The gradient of a step is the sum over its micro-batches divided
by the loss weight of all of them, so accumulation changes nothing but memory. All randomness is a function of
(seed, step, micro-batch): resuming needs no random state.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxlora.adapters.inject import count_weights
from mlxlora.engine.scores import Objective
from mlxlora.errors import RunError
from mlxlora.parameters import Flat, flat, number
from mlxlora.training.bounds import LossWatch, reached, refuse_nonfinite
from mlxlora.training.checkpoint import TrainingState
from mlxlora.training.config import TrainingConfig
from mlxlora.training.contracts import Batches, Store, TrainingEngine
from mlxlora.training.counters import Counters, Pending
from mlxlora.training.events import (
    Checkpoint,
    Control,
    Event,
    Finished,
    Foretold,
    Notice,
    Reason,
    Samples,
    Started,
    Step,
    Validation,
)
from mlxlora.training.optimizer import Optimizer
from mlxlora.training.pace import Pace
from mlxlora.training.steps import epochs_of
from mlxlora.training.validation import evaluate


def key_for(seed: int, step: int, micro: int) -> mx.array:
    """The dropout key of one micro-batch."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))


@dataclass(kw_only=True, eq=False)
class Trainer:
    """One run: iterate over it to train, as a generator of events. `control.stop()` ends it after the current step and
    saves.

    Raises TrainingError when numbers stop being finite.
    """

    network: nn.Module
    engine: TrainingEngine
    objective: Objective
    batches: Batches
    optimizer: Optimizer
    config: TrainingConfig
    validation: Batches | None = None
    """What the loss is measured on that is not trained on."""
    store: Store | None = None
    """Where checkpoints are published."""
    adapter_writer: Callable[[Path], None] | None = None
    """Puts the adapter, in its own format, into a directory; without one nothing is saved."""
    state: InitVar[TrainingState | None] = None
    """Where a resumed run goes on."""
    control: Control = field(default_factory=Control)
    pace: Pace | None = None
    sampler: Callable[[int], Samples] | None = None
    """What the model answers to held-out prompts, as the event of a step; None where there are no such prompts."""
    foretold: Foretold = field(default_factory=Foretold)
    """Told with the first event; nothing depends on it."""

    def __post_init__(self, state: TrainingState | None) -> None:
        self.counters = Counters()
        self.parameters: Flat = flat(self.network.trainable_parameters())
        self.optimizer.init(self.parameters)
        self.step = self.epoch = self.position = 0
        self.saved_at = -1
        if state is not None:
            self.restore(state)
        self.plan: Sequence[Any] = self.batches.plan(self.epoch)
        self.pending: list[Pending] = []
        self.better_since_save = False
        self.loss_watch = LossWatch()
        self.begun = time.monotonic() - self.counters.elapsed
        self.reported = time.monotonic()

    def restore(self, state: TrainingState) -> None:
        """Go on from a checkpoint. Raises RunError where it is not of these weights: it replaces no others."""
        own = self.parameters
        wrong = sorted(own.keys() ^ state.adapter.keys()) or [
            name
            for name, array in own.items()
            if (array.shape, array.dtype) != (state.adapter[name].shape, state.adapter[name].dtype)
        ]
        if wrong:
            raise RunError(f"the checkpoint's weights are not those that this run trains: {', '.join(wrong[:5])}.")
        self.step, self.epoch, self.position = state.step, state.epoch, state.position
        self.network.update(tree_unflatten(list(state.adapter.items())))
        self.parameters = flat(self.network.trainable_parameters())
        self.optimizer.restore(state.optimizer)
        self.counters = Counters.of(state.counters)
        self.saved_at = state.step

    @property
    def elapsed(self) -> float:
        """Seconds of training, earlier parts of a resumed run included."""
        return time.monotonic() - self.begun

    def __iter__(self) -> Iterator[Event]:
        mx.reset_peak_memory()
        yield Started(
            step=self.step,
            steps=self.optimizer.steps,
            epochs=epochs_of(self.batches, self.config, self.optimizer.steps),
            samples=self.batches.samples,
            trainable_parameters=sum(value.size for value in self.parameters.values()),
            total_parameters=count_weights(self.network),
            **asdict(self.foretold),
        )
        self.control.running = True
        reason: Reason | None = None
        if self.step == 0:
            yield from self.validate(first=True)
            yield from self.show_samples()
        else:
            if self.counters.owes_validation:
                yield from self.validate()
            reason = self.stop_reason()  # killed between its last save and its end
        if self.pace is not None:
            self.pace.begin()
        while reason is None and self.step < self.optimizer.steps:
            if self.asked_to_stop():  # during the validation before the first step, or the one that was owed
                reason = "stopped"
                yield from self.save()
                break
            self.one_step()
            due = self.validation_due()
            if due or self.asked_to_stop() or self.save_due() or len(self.pending) >= self.config.report_every:
                yield from self.report()
            if due:
                yield from self.validate()
            last_step = self.step == self.optimizer.steps
            reason = self.stop_reason() or ("stopped" if self.asked_to_stop() and not last_step else None)
            if last_step or reason not in (None, "stopped") or self.samples_due():
                yield from self.show_samples()
            if self.save_due() or self.control.take_save() or reason or last_step:
                yield from self.report()
                yield from self.save()
            if reason:
                break
            yield from self.rest()
        last = self.counters.losses[-1] if self.counters.losses else None
        yield Finished(
            self.step, self.epoch_now(), reason or self.last_reason(), last, self.counters.best_loss,
            self.counters.best_step, self.elapsed, mx.get_peak_memory(),
        )  # fmt: skip

    def epoch_now(self) -> float:
        """Epochs done, with the share of the current one."""
        return self.epoch + self.position / max(math.ceil(len(self.plan) / self.config.accumulate), 1)

    def one_step(self) -> None:
        """Send one update to the device."""
        size = self.config.accumulate
        first = self.position * size
        group = [self.plan[place] for place in range(first, min(first + size, len(self.plan)))]
        total: Flat = {}
        sums, counts, samples = mx.array(0.0), mx.array(0.0), 0
        for micro, planned in enumerate(group):
            batch = self.batches.batch(planned)
            key = key_for(self.config.seed, self.step, micro)
            value, count, _, gradients = self.engine.value_and_grad(self.objective, batch, key)
            here = flat(gradients)
            total = {name: total[name] + here[name] for name in here} if total else here
            sums, counts = sums + value, counts + count
            samples += len(batch.samples)
            mx.async_eval(total, sums, counts)
            del gradients, here
        self.parameters, norm, finite = self.optimizer.update(self.parameters, total, sums, counts, self.step)
        self.network.update(tree_unflatten(list(self.parameters.items())))
        loss = sums / counts
        del total  # what is named nowhere is room for the result
        mx.async_eval(self.parameters, self.optimizer.state, loss, norm, finite)
        self.step += 1
        self.position += 1
        epoch = self.epoch_now()
        if self.position * size >= len(self.plan):
            self.epoch, self.position = self.epoch + 1, 0
            self.plan = self.batches.plan(self.epoch)
        trained, processed = map(sum, zip(*(self.batches.tokens(planned) for planned in group), strict=True))
        self.pending.append(Pending(self.step, epoch, loss, norm, finite, trained, processed, samples, group))

    def report(self) -> Iterator[Event]:
        """Wait for the steps sent since the last report, check their numbers, and tell them."""
        if not self.pending:
            return
        mx.eval([(pending.loss, pending.norm, pending.finite) for pending in self.pending], self.parameters)
        now = time.monotonic()
        seconds = max(now - self.reported, 1e-9)
        self.reported = now
        trained = sum(pending.trained for pending in self.pending)
        processed = sum(pending.processed for pending in self.pending)
        steps, self.pending = self.pending, []
        for pending in steps:
            applied = bool(pending.finite.item())
            loss = number(pending.loss)
            self.counters.tokens += pending.trained
            self.counters.samples += pending.samples
            if applied:
                self.counters.losses = [*self.counters.losses, loss][-50:]
            else:
                self.counters.skipped += 1
                refuse_nonfinite(pending, self.batches, self.config, self.counters.skipped)
            yield Step(
                step=pending.step,
                steps=self.optimizer.steps,
                epoch=pending.epoch,
                loss=loss,
                learning_rate=self.optimizer.learning_rate(pending.step - 1),
                grad_norm=number(pending.norm),
                tokens=self.counters.tokens,
                tokens_per_second=trained / seconds,
                processed_per_second=processed / seconds,
                samples=self.counters.samples,
                memory=mx.get_active_memory(),
                peak_memory=mx.get_peak_memory(),
                elapsed=self.elapsed,
                remaining=self.elapsed / pending.step * (self.optimizer.steps - pending.step),
                best_loss=self.counters.best_loss,
                applied=applied,
            )
            if message := self.loss_watch.look(loss, self.counters.losses):
                yield Notice(pending.step, message)

    def validation_due(self) -> bool:
        """Whether this step is one to validate after: as configured, and always the last."""
        if self.validation is None:
            return False
        if self.step >= self.optimizer.steps:
            return True
        if self.config.validate_every is not None:
            return self.step % self.config.validate_every == 0
        return self.position == 0

    def save_due(self) -> bool:
        """Whether this step is one to save after."""
        return self.step != self.saved_at and self.step % (self.config.save_every or 100) == 0

    def samples_due(self) -> bool:
        """Whether this step is one to look at answers after, beside the first and the last."""
        return bool(self.config.sample_every) and self.step % (self.config.sample_every or 1) == 0

    def validate(self, first: bool = False) -> Iterator[Event]:
        """The loss on the whole validation set, in a fixed order and without dropout."""
        if self.validation is None:
            return
        started = time.monotonic()
        measured = evaluate(self.engine, self.objective, self.validation, self.asked_to_stop)
        self.counters.owes_validation = measured is None
        if measured is None:  # a stop does not wait for a long validation; it comes when the run goes on
            return
        loss, tokens = measured
        best = False
        if not first:
            best = self.counters.best_loss is None or loss < self.counters.best_loss
            if best:
                self.counters.best_loss, self.counters.best_step = loss, self.step
                self.counters.without_better = 0
                self.better_since_save = True
            else:
                self.counters.without_better += 1
        yield Validation(self.step, self.epoch_now(), loss, tokens, self.counters.best_loss, best, self.elapsed)
        if best:
            yield from self.save()
        self.reported += time.monotonic() - started  # so that tokens per second count training alone

    def asked_to_stop(self) -> bool:
        """Whether a signal, a callback or another thread asked the run to stop."""
        return self.control.stopping

    def last_reason(self) -> Reason:
        """Why a run ended that took all its steps: a validation may still be owed."""
        return "stopped" if self.counters.owes_validation else "done"

    def show_samples(self) -> Iterator[Event]:
        """What the model answers to the held-out prompts now."""
        if self.sampler is None or self.config.sample_every == 0:
            return
        yield from self.report()
        started = time.monotonic()
        told: Event
        try:
            told = self.sampler(self.step)
        except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
            self.sampler = None  # that a model cannot generate is no reason to lose a run
            told = Notice(self.step, f"the model's answers cannot be shown: {type(error).__name__}: {error}")
        yield told
        self.reported += time.monotonic() - started

    def rest(self) -> Iterator[Event]:
        """Let others have the machine, in gentle mode."""
        if self.pace is None:
            return
        started = time.monotonic()
        mx.eval(self.parameters)  # work still queued is no rest
        for message in self.pace.rest(lambda: self.control.stopping):
            yield Notice(self.step, message)
        self.reported += time.monotonic() - started

    def stop_reason(self) -> Reason | None:
        """Why the run ends before its last step, where a bound that was set is reached."""
        if self.step >= self.optimizer.steps:
            return None
        return reached(self.config, self.counters, self.elapsed, validates=self.validation is not None)

    def save(self) -> Iterator[Event]:
        """Publish a checkpoint of the current step, unless there is one."""
        if self.store is None or self.adapter_writer is None or self.saved_at == self.step:
            return
        self.counters.elapsed = self.elapsed
        best = self.better_since_save
        state = TrainingState(
            step=self.step,
            epoch=self.epoch,
            position=self.position,
            adapter=self.parameters,
            optimizer=self.optimizer.flat_state(),
            counters={name: getattr(self.counters, name) for name in Counters.__dataclass_fields__},
        )
        path = self.store.save(state, adapter_writer=self.adapter_writer, best=best, keep=self.config.keep)
        self.saved_at, self.better_since_save = self.step, False
        yield Checkpoint(self.step, path, best)
