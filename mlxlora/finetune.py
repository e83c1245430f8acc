"""The pipeline: data and a model in, an adapter out. Everything that happens stands here in its order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.nn as nn
import yaml

from mlxlora import architecture, hub
from mlxlora.adapters import AdapterConfig, collect, inject, load_adapter, read_adapter, remove, write_adapter
from mlxlora.answers import Answers
from mlxlora.data import DataSplits, SamplesConfig
from mlxlora.data import load as load_data
from mlxlora.data.feed import Feed
from mlxlora.data.load import Rows, places_of
from mlxlora.engine import Engine, EngineConfig
from mlxlora.errors import ConfigError
from mlxlora.files import plain
from mlxlora.memory import limit_of, limited
from mlxlora.model import LanguageModel, load, load_tokenizer
from mlxlora.objectives.sft import sft
from mlxlora.parameters import flat
from mlxlora.progress import Progress
from mlxlora.reporting import trackers
from mlxlora.reporting.watch import FinetuneResult, Watch, describe, left_out
from mlxlora.tokenizer import Tokenizer
from mlxlora.training.checkpoint import TrainingState
from mlxlora.training.choice import Prepared, described, prepare, refusal, shapes
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Control, Event, Foretold
from mlxlora.training.forecast import outlook
from mlxlora.training.identity import check_accepted, identify
from mlxlora.training.loop import Trainer
from mlxlora.training.optimizer import Optimizer, OptimizerConfig
from mlxlora.training.pace import Host, Pace
from mlxlora.training.run import RunDirectory
from mlxlora.training.steps import count_steps, count_validations, steps_in

FROZEN = 8 * 10**9  # bytes on disk that may hold what frozen lower blocks make of the samples
NO_PROMPTS = "training.sample_every: there is no validation data to take prompts from, so no answers are shown"


def finetune(
    model: str,
    data: list[str] | Rows,
    out: Path,
    *,
    samples: SamplesConfig = SamplesConfig(),  # noqa: B008
    adapter: AdapterConfig = AdapterConfig(),  # noqa: B008
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
    training: TrainingConfig = TrainingConfig(),  # noqa: B008
    start_from: Path | None = None,
    overwrite: bool = False,
    accept_changes: list[str] | None = None,
    memory_limit: str | None = None,
    gentle: bool = False,
    report_to: list[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_event: Callable[[Event], None] | None = None,
    on_progress: Progress | None = None,
    control: Control | None = None,
) -> FinetuneResult:
    """Fine-tune a model on your data; the same call again goes on with an unfinished run.

    Args:
        model: a model directory, or a model on the Hugging Face hub
        data: files or directories with rows to learn from; `PATH=WEIGHT` says how often each is seen in an epoch (in
            Python also the rows themselves, as `mlxlora.data.from_rows` takes them)
        out: the run directory; `adapter` and `best` in it are the results
        start_from: an adapter, or another run, that this one begins with: of the same type and targets, its rank at
            most that of this one; its own learning rate and moments are not taken over
        overwrite: begin anew where a run stands already
        accept_changes: settings that may differ from those that an unfinished run was begun with, such as
            optimizer.learning_rate
        memory_limit: what MLX may take, such as 12GB; default a safe share of what the machine recommends
        gentle: for a Mac in use: computes half of the time and block by block, pauses on battery and in heat, keeps the
            machine awake
        report_to: trackers: tensorboard, wandb, swanlab, trackio
        revision: branch, tag or commit on the hub
        trust_remote_code: allow the model to run Python code of its own
        on_event: called with every event of `mlxlora.training.events`
        control: its `stop()` and `save()` may be called at any time, from a callback too

    Raises InputError (and its kinds) before anything is written, TrainingError when the run cannot go on.
    """
    settings = {
        "model": model, "data": places_of(data), "out": out, "samples": samples, "adapter": adapter,
        "optimizer": optimizer, "training": training, "start_from": start_from, "memory_limit": memory_limit,
        "gentle": gentle, "report_to": report_to, "revision": revision, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    # what can be known now is not told after minutes of reading data
    refuse_pointless(adapter, optimizer)
    limit_of(memory_limit)
    trackers.check(report_to or [])
    RunDirectory.look(out, overwrite=overwrite)
    if start_from is not None:
        refuse_own(start_from, out)
        read_adapter(start_from)

    path = hub.find(model, revision=revision)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    splits = load_data(
        data, tokenizer, samples, seed=training.seed,
        vocabulary_size=architecture.text_config(architecture.read_config(path)).get("vocab_size"),
        on_progress=on_progress,
    )  # fmt: skip
    return learn(
        path, tokenizer, splits, settings, overwrite=overwrite, accept_changes=accept_changes or (),
        on_event=on_event, control=control,
    )  # fmt: skip


def learn(
    path: Path,
    tokenizer: Tokenizer,
    splits: DataSplits,
    settings: dict[str, Any],
    *,
    overwrite: bool = False,
    accept_changes: Sequence[str] = (),
    on_event: Callable[[Event], None] | None = None,
    control: Control | None = None,
    note: str = "",
) -> FinetuneResult:
    """A run of the model at `path` on samples that were read before.

    settings: the options of `finetune` by name, all of them
    note:     what they do not tell of this run; it heads config.yaml and stands in the report
    """
    identity = identify(path, tokenizer, splits, settings)
    accepted = check_accepted(accept_changes, identity)
    limit = limit_of(settings["memory_limit"])
    with (
        RunDirectory.open(settings["out"], identity=identity, overwrite=overwrite, accept=accepted) as run,
        limited(limit),
    ):
        language_model = load(path, trust_remote_code=settings["trust_remote_code"])
        host = Host() if settings["gentle"] else None
        watch = Watch(run, on_event, lambda: trackers.trackers(settings["report_to"] or [], run.path, plain(settings)))
        with host.awake() if host else contextlib.nullcontext(), watch:
            for event in session(
                language_model, splits, run, settings, watch, control, Pace(host=host) if host else None, limit, note
            ):
                watch(event)
        return watch.result(settings["model"], rows_given=settings["data"] is None)


def session(
    model: LanguageModel,
    splits: DataSplits,
    run: RunDirectory,
    settings: dict[str, Any],
    watch: Watch,
    control: Control | None,
    pace: Pace | None,
    limit: int,
    note: str = "",
) -> Iterator[Event]:
    """One session of a run on a loaded model: inject, train, and leave the model as it was."""
    network, samples = model.network, settings["samples"]
    training: TrainingConfig = replace(settings["training"], **run.chosen)
    inject(network, settings["adapter"], seed=training.seed)
    ready: Prepared | None = None
    try:
        if settings["start_from"] is not None:
            load_adapter(network, settings["start_from"], base=model.fingerprint)
        ready = prepare(
            network, EngineConfig(wait=settings["gentle"]), settings["optimizer"], sft, training,
            partial(shapes, splits, samples), vocabulary=model.vocabulary, limit=limit,
        )  # fmt: skip
        engine, optimizer, choice = ready.engine, ready.optimizer, ready.choice
        if choice.training is None:
            raise refusal(ready.forecaster, choice, training, limit)
        training = choice.training
        batches, held_out = feeds(splits, samples, training)
        optimizer.steps = count_steps(batches, training)
        kept = keep_frozen(engine, batches, training, optimizer.steps, run.path)
        expected = outlook(
            batches, held_out, choice.forecast, optimizer.steps,
            count_validations(batches, training, optimizer.steps), engine.frozen_kept,
        )  # fmt: skip
        state = run.latest()
        run.require_space(starting_state(network, optimizer), keep=training.keep)
        run.chosen = choice.kept(settings["training"])
        options = yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True)
        run.write_config(f"# {note}\n{options}" if note else options)
        watch.notices += [
            *([note] if note else []),
            *architecture.silently_wrong(model.config), *left_out(splits), *engine.notes, *run.notices,
            *choice.notices(settings["training"], limit), *([kept] if kept else []),
            *([NO_PROMPTS] if training.sample_every and splits.valid is None else []),
        ]  # fmt: skip

        def write(path: Path) -> None:
            name = Path(settings["model"]).name
            write_adapter(path, collect(model.network, base=model.fingerprint, base_name=name))

        yield describe(splits)
        yield from Trainer(
            network=network, engine=engine, objective=sft, batches=batches, optimizer=optimizer, config=training,
            validation=held_out, store=run, adapter_writer=write, state=state, control=control or Control(), pace=pace,
            sampler=None if splits.valid is None else Answers(model, splits.valid),
            foretold=Foretold(
                predicted_peak=choice.forecast.peak, memory_limit=limit,
                predicted_seconds=expected.seconds / (pace.duty if pace else 1.0),
                predicted_tokens_per_second=expected.tokens_per_second, chosen=described(choice.forecast),
                why=choice.why(),
            ),
        )  # fmt: skip
    finally:
        if ready is not None:
            ready.engine.close()
        remove(network)


def refuse_pointless(adapter: AdapterConfig, optimizer: OptimizerConfig) -> None:
    """Raise ConfigError for a setting that has nothing to act on."""
    if adapter.type == "full" and optimizer.lora_plus_ratio != 1:
        raise ConfigError("optimizer.lora_plus_ratio is given, but adapter.type full has no lora_b.")


def refuse_own(start_from: Path, out: Path) -> None:
    """Raise ConfigError when a run is to begin with what lies in its own directory, which it replaces."""
    if Path(start_from).resolve().is_relative_to(Path(out).resolve()):
        raise ConfigError(f"--start_from {start_from} lies in {out}, which this run writes. Choose another --out.")


def feeds(splits: DataSplits, samples: SamplesConfig, training: TrainingConfig) -> tuple[Feed, Feed | None]:
    """The batches to learn from, and those to validate on."""
    batching = training.batching(samples)
    held_out = None if splits.valid is None else Feed(splits.valid, batching, 0, shuffle=False)
    return Feed(splits.train, batching, training.seed), held_out


def keep_frozen(
    engine: Engine, batches: Feed, training: TrainingConfig, steps: int, directory: Path | None = None
) -> str | None:
    """Have the engine compute once what frozen blocks make of a text, where that pays; returns what is to be said."""
    epochs = steps / steps_in(batches, training, 0)
    return engine.keep_frozen(int(batches.dataset.lengths.sum()), epochs, FROZEN, directory)


def starting_state(network: nn.Module, optimizer: Optimizer) -> TrainingState:
    """What a checkpoint will hold, for its size."""
    return TrainingState(0, 0, 0, flat(network.trainable_parameters()), optimizer.flat_state())
