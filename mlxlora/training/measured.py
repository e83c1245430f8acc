"""What no account tells is measured on less: an update on short arrays, a step that is one graph on a few blocks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import block_paths
from mlxlora.adapters.inject import get_module
from mlxlora.data import Batch
from mlxlora.engine import Engine, EngineConfig
from mlxlora.engine.account import Account
from mlxlora.parameters import Flat, bytes_of, flat
from mlxlora.training.optimizer import Optimizer, OptimizerConfig

FEW, MORE = 2, 4  # blocks in place in the two steps of a model whose step is one graph
SAMPLE = 1 << 26  # bytes of the arrays that the update is measured on


def above(work: Callable[[], Any]) -> tuple[int, float]:
    """(bytes, seconds): what `work` needs at its peak beside what lies there already, and how long it takes."""
    mx.synchronize()
    mx.reset_peak_memory()
    before, begun = mx.get_active_memory(), time.perf_counter()
    mx.eval(work())
    seconds = time.perf_counter() - begun
    return max(mx.get_peak_memory() - before, 0), seconds


def update_needs(config: OptimizerConfig, parameters: Flat) -> tuple[int, float]:
    """(bytes, seconds): what an update needs beside parameters and moments, the gradient included, and its time.

    Measured on as many arrays, all smaller by one factor: how many are under way at a time is a matter of their number.
    """
    size = bytes_of(parameters)
    if not size:
        return 0, 0.0
    factor = -(-size // SAMPLE)
    own = {
        name: mx.zeros((-(-value.shape[0] // factor), *value.shape[1:]) if value.ndim else (), value.dtype)
        for name, value in parameters.items()
    }
    optimizer = Optimizer(config, 1)
    optimizer.init(own)
    mx.eval(own)

    def update() -> Any:
        nonlocal own
        gradients = {name: mx.zeros_like(value) for name, value in own.items()}
        mx.eval(gradients)
        own, norm, finite = optimizer.update(own, gradients, mx.array(0.0), mx.array(1.0), 0)
        del gradients
        return own, optimizer.state, norm, finite

    found = [above(update) for _ in range(2)]  # the first one compiles
    scale = size / bytes_of(own)
    return round(max(most for most, _ in found) * scale), found[-1][1] * scale


def one_graph(engine: Engine, objective: Any, batch: Batch, gradients: bool) -> Account:
    """The account of a step that has no parts: by a line through steps with a few of the blocks in place."""
    network, config = engine.network, engine.config
    blocks = _running(network)
    if blocks <= MORE:
        return _whole(network, config, objective, batch, gradients)
    try:
        with only_last(network, FEW):
            few = _whole(network, config, objective, batch, gradients)
        with only_last(network, MORE):
            more = _whole(network, config, objective, batch, gradients)
    except (IndexError, ValueError, AttributeError, TypeError, KeyError):
        return _whole(network, config, objective, batch, gradients)  # its forward pass needs all of its blocks
    times = (blocks - MORE) / (MORE - FEW)
    return Account(
        peak=more.peak + round(max(more.peak - few.peak, 0) * times),
        few=more.few,
        by_loss=0,
        seconds=more.seconds + max(more.seconds - few.seconds, 0.0) * times,
    )


def _running(network: nn.Module) -> int:
    """How many blocks have a backward pass: all from the first that learns."""
    paths = block_paths(network)
    learned = list(flat(network.trainable_parameters()))
    inside = [any(name.startswith(f"{path}.") for name in learned) for path in paths]
    outside = any(not any(name.startswith(f"{path}.") for path in paths) for name in learned)
    return len(paths) if outside or not any(inside) else len(paths) - inside.index(True)


def _whole(network: nn.Module, config: EngineConfig, objective: Any, batch: Batch, gradients: bool) -> Account:
    engine = Engine(network, config)

    def step() -> Any:
        if not gradients:
            return engine.evaluate(objective, batch)
        return engine.value_and_grad(objective, batch, mx.random.key(0))

    try:
        compiling, _ = above(step)
        size, seconds = above(step)
    finally:
        engine.close()
    return Account(max(compiling, size), max(compiling, size), 0, seconds)


@contextlib.contextmanager
def only_last(network: nn.Module, count: int) -> Iterator[None]:
    """Within the block, the network has only its last `count` blocks: where only some learn, it is those."""
    path = block_paths(network)[0].rsplit(".", 1)[0]
    owner = get_module(network, path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    whole = owner[name]
    try:
        owner[name] = list(whole)[-count:]
        yield
    finally:
        owner[name] = whole
