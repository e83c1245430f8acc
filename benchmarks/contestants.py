"""Those who compute the same step, each in a process of its own: none sees what another patched or kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from benchmarks.scenarios import (
    CHECKPOINT,
    INPUTS,
    PEFT_CHECKPOINT,
    ROW,
    SHIPPED,
    STEP,
    TORCH,
    TRAINER,
    Arrays,
    Scenario,
    network,
    padded,
    samples,
)
from benchmarks.torch_peft import TorchPeft
from mlxlora import mlxlm
from mlxlora.engine import Engine, EngineConfig
from mlxlora.engine.config import CheckpointBlocks
from mlxlora.objectives import sft
from mlxlora.parameters import flat, number

EPOCHS, KEPT = 2.0, 4 * 10**9  # where only upper blocks learn, steps are those of the second epoch; bytes in memory
TOKENS = 1536  # of an optimizer step of this project's trainer; a longer sample makes a batch by itself


@dataclass(frozen=True)
class Timing:
    """One measured step or run: seconds on the clock, seconds of processor time, bytes above what was resident."""

    wall: float
    cpu: float
    memory: int
    trained: float


class Contestant(Protocol):
    """One way of training on the scenario's samples: a step, or a trainer's run over all of them."""

    def answer(self) -> tuple[float, Arrays]:
        """Loss per token and gradients of the adapters (a trainer has none to show); also warms up."""
        ...

    def step(self) -> float:
        """One step, or one run; returns the weight of the tokens trained on."""
        ...


def measure(contestant: Contestant) -> Timing:
    """Time one step or run, and count its memory: each library counts its own."""
    mx.clear_cache()
    resident = mx.get_active_memory()
    mx.reset_peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    trained = contestant.step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = contestant.peak if isinstance(contestant, TorchPeft) else mx.get_peak_memory() - resident
    return Timing(wall, cpu, memory, trained)


class Ours:
    """This project's engine."""

    def __init__(self, scenario: Scenario, grade: CheckpointBlocks, dtype: mx.Dtype) -> None:
        self._scenario, self._network = scenario, network(scenario, dtype)
        self._engine = Engine(self._network, EngineConfig(checkpoint_blocks=grade))
        self._engine.keep_frozen(sum(scenario.lengths), EPOCHS, KEPT)
        self._batch = padded(samples(scenario))

    def answer(self) -> tuple[float, Arrays]:
        total, count, _, grads = self._engine.value_and_grad(sft, self._batch)
        mx.eval(total, count, grads)
        return number(total) / number(count), gradients(grads)

    def step(self) -> float:
        total, count, _, grads = self._engine.value_and_grad(sft, self._batch)
        mx.eval(total, count, grads)
        return float(self._batch.targets.size)


class OurTrainer:
    """This project's engine, batches and optimizer over all samples of a scenario."""

    def __init__(self, scenario: Scenario, dtype: mx.Dtype) -> None:
        from mlxlora.data.batches import plan_epoch
        from mlxlora.data.config import BatchConfig

        self._network = network(scenario, dtype)
        self._engine = Engine(self._network, EngineConfig(checkpoint_blocks="products"))
        self._engine.keep_frozen(sum(scenario.lengths), EPOCHS, KEPT)
        self._samples = samples(scenario)
        lengths = np.array(scenario.lengths, np.int32)
        # packed, so that samples of any lengths make one batch where mlx-lm makes one
        batches = BatchConfig(tokens_per_batch=TOKENS, packing=True, max_length=TOKENS)
        epochs = [plan_epoch(lengths, batches, seed=0, epoch=epoch) for epoch in range(scenario.passes)]
        self._plan = [planned for epoch in epochs for planned in epoch]

    def answer(self) -> tuple[float, Arrays]:
        self.step()
        return float("nan"), {}

    def step(self) -> float:
        from mlxlora.data.batches import collate
        from mlxlora.training.optimizer import Optimizer, OptimizerConfig

        optimizer, trained = Optimizer(OptimizerConfig(), steps=len(self._plan)), 0.0
        optimizer.init(flat(self._network.trainable_parameters()))
        for step, planned in enumerate(self._plan):
            batch = collate(self._samples, planned)
            total, count, _, grads = self._engine.value_and_grad(sft, batch)
            parameters = flat(self._network.trainable_parameters())
            new, _, _ = optimizer.update(parameters, flat(grads), total, count, step)
            self._network.load_weights(list(new.items()), strict=False)
            mx.async_eval(new, total)
            trained += float(np.sum([self._samples[i].weights.sum() for i in planned.samples]))
        mx.eval(self._network.trainable_parameters())
        return trained


class MlxLmStep:
    """mlx-lm's loss and compiled step, as in its trainer, with or without its `grad_checkpoint`."""

    def __init__(self, scenario: Scenario, checkpoint: bool, dtype: mx.Dtype) -> None:
        self._network = network(scenario, dtype)
        trainer = mlxlm.module("tuner.trainer")
        if checkpoint:
            trainer.grad_checkpoint(self._network.layers[0])
        made = samples(scenario)
        batch = padded(made)
        self._tokens = mx.concatenate([batch.tokens, mx.zeros((len(made), 1), mx.int32)], axis=1)
        # the first predicted token and the last, as default_loss counts them: without its one pad token too many
        self._lengths = mx.array([[int(np.flatnonzero(s.weights)[0]), len(s.tokens) - 1] for s in made])
        loss_and_grad = nn.value_and_grad(self._network, trainer.default_loss)
        state = [self._network.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(tokens: mx.array, lengths: mx.array) -> Any:
            return loss_and_grad(self._network, tokens, lengths)

        self._step: Callable[..., Any] = step
        self._network.train()

    def answer(self) -> tuple[float, Arrays]:
        (loss, count), grads = self._step(self._tokens, self._lengths)
        mx.eval(loss, grads)
        return number(loss), {name: grad * number(count) for name, grad in gradients(grads).items()}

    def step(self) -> float:
        (loss, count), grads = self._step(self._tokens, self._lengths)
        mx.eval(loss, grads)
        return number(count)


class MlxLmTrainer:
    """mlx-lm's trainer as it ships: its batches, its step, its optimizer, over all samples of a scenario."""

    def __init__(self, scenario: Scenario, dtype: mx.Dtype) -> None:
        self._scenario, self._network, self._samples = scenario, network(scenario, dtype), samples(scenario)

    def answer(self) -> tuple[float, Arrays]:
        self.step()
        return float("nan"), {}

    def step(self) -> float:
        import mlx.optimizers as optimizers

        trainer, datasets = mlxlm.module("tuner.trainer"), mlxlm.module("tuner.datasets")
        made, scenario, counted = self._samples, self._scenario, [0.0]

        class Rows:
            """Rows as mlx-lm's chat data set has them; it sorts by the length of a row, a dict of one entry."""

            def __len__(self) -> int:
                return len(made)

            def __getitem__(self, index: int) -> dict[str, int]:
                return {"messages": index}

            def process(self, row: dict[str, int]) -> tuple[list[int], int]:
                sample = made[row["messages"]]
                return sample.tokens.tolist(), int(np.flatnonzero(sample.weights)[0])

        class Count(mlxlm.module("tuner.callbacks").TrainingCallback):  # type: ignore[misc]
            """What it says it trained on."""

            def on_train_loss_report(self, report: dict[str, Any]) -> None:
                counted[0] = report["trained_tokens"]

        with TemporaryDirectory() as directory, redirect_stdout(StringIO()):
            arguments = trainer.TrainingArgs(
                batch_size=scenario.batch, iters=scenario.passes * len(made) // scenario.batch,
                max_seq_length=max(scenario.lengths) + ROW + 1,  # it would cut longer ones off
                steps_per_report=10**9, steps_per_save=10**9,
                adapter_file=str(Path(directory) / "adapters.safetensors"),
            )  # fmt: skip
            trainer.train(
                self._network, optimizers.Adam(learning_rate=1e-5), datasets.CacheDataset(Rows()), args=arguments,
                training_callback=Count(),
            )  # fmt: skip
        return counted[0] - scenario.passes * len(made)  # it counts, and learns, one pad token after each sample


def gradients(grads: Any) -> Arrays:
    """Gradients by path, as numpy arrays."""
    return {path: np.array(grad.astype(mx.float32)) for path, grad in flat(grads).items()}


def enter(name: str, scenario: Scenario, dtype: mx.Dtype) -> Contestant:
    """The contestant of this name, ready to run."""
    if name in (STEP, CHECKPOINT):
        return MlxLmStep(scenario, name == CHECKPOINT, dtype)
    if name == SHIPPED:
        return MlxLmTrainer(scenario, dtype)
    if name in TORCH:
        return TorchPeft(scenario, name == PEFT_CHECKPOINT, dtype)
    if name == TRAINER:
        return OurTrainer(scenario, dtype)
    return Ours(scenario, "inputs" if name == INPUTS else "products", dtype)
