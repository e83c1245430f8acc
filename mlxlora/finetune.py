"""The pipeline: data and a model in, an adapter out. Everything that happens stands here in its order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora.adapters import AdapterConfig
from mlxlora.data.config import BatchConfig, SamplesConfig
from mlxlora.errors import ConfigError, nearest
from mlxlora.files import plain
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Checkpoint, Control, Data, Event, Finished, Notice, Reason, Validation
from mlxlora.training.optimizer import OptimizerConfig

if TYPE_CHECKING:
    from mlxlora.data import Dataset, DataSplits
    from mlxlora.data.batches import Planned
    from mlxlora.data.sample import Batch
    from mlxlora.model import LanguageModel
    from mlxlora.tokenizer import Tokenizer
    from mlxlora.training.run import RunDirectory

# settings that may differ when an unfinished run goes on: they say how long, how often and in what memory
FREE = {
    f"training.{name}"
    for name in (
        "epochs", "steps", "validate_every", "save_every", "report_every", "keep", "patience", "target_loss",
        "max_minutes", "skip_nonfinite", "checkpoint_blocks", "frozen_cache",
    )
} | {"samples.cache"}  # fmt: skip


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to."""

    run: Path
    adapter: Path
    """the adapter to use: that of the lowest validation loss, or the last one where there was no validation"""
    reason: Reason
    step: int
    epoch: float
    loss: float | None
    """of the last step"""
    baseline_loss: float | None
    """validation loss before the first step"""
    best_loss: float | None
    """lowest validation loss"""
    best_step: int | None
    seconds: float
    peak_memory: int
    model: str
    notices: list[str]

    def __str__(self) -> str:
        why = {
            "done": "finished",
            "stopped": "stopped and saved; the same command goes on from here",
            "patience": "finished: validation stopped getting better",
            "target_loss": "finished: the target loss is reached",
            "max_minutes": "finished: the time is up",
        }[self.reason]
        lines = [f"{why} at step {self.step:,}, epoch {self.epoch:.2f}"]
        if self.best_loss is not None and self.baseline_loss is not None:
            best = f"{self.best_loss:.4f} at best (step {self.best_step:,})"
            lines.append(f"validation loss {self.baseline_loss:.4f} before, {best}")
        lines.append(f"adapter: {self.adapter}")
        if self.reason != "stopped":
            lines.append(f"try it:  mlxlora chat --model {self.model} --adapter {self.run}")
            lines.append(f"fuse it: mlxlora fuse --model {self.model} --adapter {self.run} --out DIR")
        return "\n".join(lines)


def finetune(
    model: str,
    data: list[str],
    out: Path,
    *,
    samples: SamplesConfig = SamplesConfig(),  # noqa: B008
    adapter: AdapterConfig = AdapterConfig(),  # noqa: B008
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
    training: TrainingConfig = TrainingConfig(),  # noqa: B008
    overwrite: bool = False,
    accept_changes: list[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_event: Callable[[Event], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    control: Control | None = None,
) -> FinetuneResult:
    """Fine-tune a model on your data; the same call again goes on with an unfinished run.

    Args:
        model: a model directory, or a model on the Hugging Face hub
        data: files or directories with rows to learn from; `PATH=WEIGHT` says how often each is seen in an epoch
        out: the run directory; `adapter` and `best` in it are the results
        overwrite: begin anew where a run stands already
        accept_changes: settings that may differ from those that an unfinished run was begun with, such as
            optimizer.learning_rate
        revision: branch, tag or commit on the hub
        trust_remote_code: allow the model to run Python code of its own
        on_event: called with every event of `mlxlora.training.events`
        control: its `stop()` and `save()` may be called at any time, from a callback too

    Raises InputError (and its kinds) before anything is written, TrainingError when the run cannot go on.
    """
    from mlxlora import hub
    from mlxlora.model import load_tokenizer

    path = hub.find(model, revision=revision)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    splits = load_data(data, tokenizer, samples, training, on_progress)
    call = {
        "model": model, "data": data, "out": out, "samples": samples, "adapter": adapter, "optimizer": optimizer,
        "training": training, "revision": revision, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    identity = identify(path, tokenizer, splits, call)
    accepted = check_accepted(accept_changes or [], identity)

    from mlxlora.training.run import RunDirectory

    with RunDirectory.open(out, identity=identity, overwrite=overwrite, accept=accepted) as run:
        from mlxlora.model import load

        if on_progress:
            on_progress("loading the model", 0, 1)
        language_model = load(path, trust_remote_code=trust_remote_code)
        if on_progress:
            on_progress("loading the model", 1, 1)
        watch = Watch(on_event)
        for event in session(language_model, splits, run, call, control, watch.notices):
            watch(event, run)
        return watch.result(run, model)


def load_data(
    data: Sequence[str],
    tokenizer: Tokenizer,
    samples: SamplesConfig,
    training: TrainingConfig,
    on_progress: Callable[[str, int, int], None] | None,
) -> DataSplits:
    """Everything is read, tokenised and checked here, before the model is loaded."""
    from mlxlora.data import load

    return load(data[0] if len(data) == 1 else data, tokenizer, samples, seed=training.seed, on_progress=on_progress)


def session(
    model: LanguageModel,
    splits: DataSplits,
    run: RunDirectory,
    call: dict[str, Any],
    control: Control | None,
    notices: list[str],
) -> Iterator[Event]:
    """One session of a run on a loaded model: inject, train, and leave the model as it was."""
    import yaml

    from mlxlora.adapters import collect, inject, remove, write_adapter
    from mlxlora.engine.config import EngineConfig
    from mlxlora.engine.engine import Engine
    from mlxlora.objectives.sft import sft
    from mlxlora.training.loop import count_steps, train
    from mlxlora.training.optimizer import Optimizer

    training: TrainingConfig = call["training"]
    samples: SamplesConfig = call["samples"]
    inject(model.network, call["adapter"], seed=training.seed)
    engine = Engine(model.network, EngineConfig(checkpoint_blocks=training.blocks))
    try:
        batching = BatchConfig(
            batch_size=training.batch_size or 4,
            tokens_per_batch=training.tokens_per_batch,
            packing=samples.packing,
            max_length=samples.max_length,
        )
        batches = Feed(splits.train, batching, training.seed)
        held_out = Feed(splits.valid, batching, 0, shuffle=False) if splits.valid is not None else None
        optimizer = Optimizer(call["optimizer"], count_steps(batches, training))
        state = run.latest()
        run.write_config(yaml.safe_dump(plain(call), sort_keys=False, allow_unicode=True))
        notices += [*left_out(splits), *engine.notes, *run.notices]
        yield describe(splits)
        yield from train(
            model.network,
            engine,
            sft,
            batches,
            optimizer,
            training,
            validation=held_out,
            store=run,
            adapter_writer=lambda path: write_adapter(
                path, collect(model.network, base=model.fingerprint, base_name=Path(call["model"]).name)
            ),
            state=state,
            control=control,
        )
    finally:
        engine.close()
        remove(model.network)


def describe(splits: DataSplits) -> Data:
    """Counts and a histogram of the samples to learn from."""
    import numpy as np

    train = splits.train
    counts, edges = np.histogram(train.lengths, bins=min(30, int(train.lengths.max())), range=(0, train.lengths.max()))
    return Data(
        step=0,
        samples=len(train),
        validation_samples=len(splits.valid) if splits.valid is not None else 0,
        tokens=int(train.lengths.sum()),
        trained_tokens=int(train.trained.sum()),
        shortest=int(train.lengths.min()),
        longest=int(train.lengths.max()),
        histogram_edges=[round(edge) for edge in edges[:-1]],
        histogram_counts=counts.tolist(),
    )


def left_out(splits: DataSplits) -> list[str]:
    """What a person should know of the rows that are not learned as they stand, one line a split and reason."""
    lines = []
    for name, counts in splits.counts.items():
        for number, what in (
            (counts.truncated, "cut to samples.max_length"),
            (counts.dropped, "left out: longer than samples.max_length"),
            (counts.unlocated, "left out: the answer could not be located in the chat template's text"),
            (counts.untrained, "left out: nothing in them is learned"),
            (counts.unended, "learned without a token that ends the turn"),
            (counts.dropped_thinking, "turns whose reasoning the chat template leaves out"),
        ):
            if number:
                lines.append(f"{name}: {number:,} of {counts.rows:,} rows {what}")
    return lines


class Feed:
    """A data set as the training loop wants it: planned a whole epoch at a time, put together when it is needed."""

    def __init__(self, dataset: Dataset, config: BatchConfig, seed: int, *, shuffle: bool = True) -> None:
        self.dataset, self.config, self.seed, self.shuffle = dataset, config, seed, shuffle
        self._epoch = -1
        self._plan: Sequence[Planned] = ()

    @property
    def samples(self) -> int:
        """How many samples an epoch has."""
        return len(self.dataset)

    def plan(self, epoch: int) -> Sequence[Planned]:
        """The batches of one epoch; a function of seed and epoch alone."""
        from mlxlora.data.batches import plan_epoch

        if epoch != self._epoch:
            self._plan = plan_epoch(
                self.dataset.lengths, self.config, seed=self.seed, epoch=epoch, repeats=self.dataset.repeats,
                shuffle=self.shuffle,
            )  # fmt: skip
            self._epoch = epoch
        return self._plan

    def batch(self, planned: Planned) -> Batch:
        """The arrays of one batch."""
        from mlxlora.data.batches import collate

        return collate(self.dataset, planned)

    def tokens(self, planned: Planned) -> tuple[int, int]:
        """(trained, processed) tokens of one batch, padding left out."""
        chosen = list(planned.samples)
        return int(self.dataset.trained[chosen].sum()), int(self.dataset.lengths[chosen].sum())

    def origins(self, planned: Planned) -> list[str]:
        """file:line of the samples of one batch."""
        return [self.dataset.origin(index) for index in planned.samples]


def identify(path: Path, tokenizer: Tokenizer, splits: DataSplits, call: dict[str, Any]) -> dict[str, Any]:
    """What must not change while a run is unfinished: contents by their hashes, settings by their values."""
    from mlxlora.model import fingerprint

    settings = {
        f"{group}.{field.name}": plain(getattr(call[group], field.name))
        for group in ("samples", "adapter", "optimizer", "training")
        for field in fields(call[group])
    }
    return {
        "model": fingerprint(path),
        "tokenizer": tokenizer.fingerprint,
        "data": splits.train.fingerprint,
        "validation data": splits.valid.fingerprint if splits.valid is not None else None,
    } | {name: value for name, value in settings.items() if name not in FREE}


def check_accepted(names: Sequence[str], identity: dict[str, Any]) -> list[str]:
    """The settings that the caller lets differ: the optimizer's, but not which optimizer it is."""
    allowed = [name for name in identity if name.startswith("optimizer.") and name != "optimizer.name"]
    for name in names:
        if name not in allowed:
            raise ConfigError(
                f"accept_changes: '{name}' is none of the settings that may change within a run."
                f"{nearest(name, allowed)} They are: {', '.join(allowed)}."
            )
    return list(names)


class Watch:
    """Passes events on to metrics.jsonl and the caller, and remembers what the result tells."""

    def __init__(self, on_event: Callable[[Event], None] | None) -> None:
        self.on_event = on_event
        self.notices: list[str] = []
        self.told = 0
        self.baseline: float | None = None
        self.finished: Finished | None = None

    def __call__(self, event: Event, run: RunDirectory) -> None:
        from mlxlora.reporting.jsonl import append

        pending = [Notice(getattr(event, "step", 0), text) for text in self.notices[self.told :]]
        self.told = len(self.notices)
        for one in (event, *pending):
            if not isinstance(one, Checkpoint):
                append(run.metrics_path, one)
            if isinstance(one, Validation) and one.step == 0:
                self.baseline = one.loss
            if isinstance(one, Finished):
                self.finished = one
            if self.on_event:
                self.on_event(one)

    def result(self, run: RunDirectory, model: str) -> FinetuneResult:
        finished = self.finished
        assert finished is not None
        if self.baseline is None:
            self.baseline = baseline(run.metrics_path)
        result = FinetuneResult(
            run=run.path,
            adapter=run.best_path if run.best_path.exists() else run.adapter_path,
            reason=finished.reason,
            step=finished.step,
            epoch=finished.epoch,
            loss=finished.loss if finished.loss is None or math.isfinite(finished.loss) else None,
            baseline_loss=self.baseline,
            best_loss=finished.best_loss,
            best_step=finished.best_step,
            seconds=finished.elapsed,
            peak_memory=finished.peak_memory,
            model=model,
            notices=self.notices,
        )
        if finished.reason != "stopped":
            run.finish(plain(result))
        return result


def baseline(metrics: Path) -> float | None:
    """The validation loss before the first step, from the metrics of the sessions before."""
    from mlxlora.reporting.jsonl import read

    for event in read(metrics):
        if event["event"] == "validation" and event["step"] == 0:
            loss = event["loss"]
            return None if loss is None else float(loss)
    return None
