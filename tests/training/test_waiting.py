"""The host goes ahead of the device from one report to the next."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.engine import Engine, EngineConfig
from mlxlora.objectives.sft import sft
from mlxlora.training.config import TrainingConfig
from mlxlora.training.loop import Trainer
from mlxlora.training.optimizer import Optimizer, OptimizerConfig
from tests import reference, tiny
from tests.machines import pretend_accelerator
from tests.rows import Rows


def test_between_two_reports_the_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: where nothing that is sent is ever computed, steps are sent all the same."""
    pretend_accelerator(monkeypatch)
    network = tiny.network("llama")
    inject(network, AdapterConfig(rank=2))
    engine = Engine(network, EngineConfig(compile="never"))
    rows = Rows(reference.samples([200, 300, 150, 250], tiny.VOCABULARY), 2)
    trainer = Trainer(
        network=network, engine=engine, objective=sft, batches=rows, optimizer=Optimizer(OptimizerConfig(), 10),
        config=TrainingConfig(steps=10, report_every=4, accumulate=2),
    )  # fmt: skip
    trainer.one_step()
    mx.eval(trainer.parameters, trainer.optimizer.state)
    waits: list[bool] = []
    monkeypatch.setattr(mx, "eval", lambda *_: waits.append(True))
    monkeypatch.setattr(mx, "synchronize", lambda *_: waits.append(True))
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    assert engine._chain is not None
    engine._chain.send = lambda *_: None
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(3):
        trainer.one_step()
    assert not waits and mx.get_peak_memory() - before < 200_000  # batches alone; a step takes megabytes
    engine.close()
