"""What the blocks below the first that learns make of a text is computed once, where that pays; and nothing waits."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.engine import Engine, frozen
from mlxlora.engine.frozen import FrozenStates, pays
from mlxlora.objectives.sft import sft
from tests import reference, tiny
from tests.machines import pretend_accelerator

PLENTY = 10**9


def prepared(**settings: Any) -> Engine:
    network = tiny.network("llama", num_hidden_layers=3)
    inject(network, AdapterConfig(**{"rank": 4, "layers": 1, **settings}), seed=1)
    reference.awaken(network)
    return Engine(network)


def watched(engine: Engine) -> list[Any]:
    """The blocks that run forward from now on."""
    calls: list[Any] = []
    assert engine._chain is not None
    first: Any = engine._chain.functions.forward
    engine._chain.functions.forward = lambda here, keep: calls.append(here.block) or first(here, keep)  # type: ignore
    return calls


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("where", ["memory", "file"])
def test_the_second_epoch_runs_the_blocks_that_learn(where: str, tmp_path: Path) -> None:
    """Packed or not, and with numbers that are the same to the bit."""
    engine = prepared()
    made = reference.samples([23, 40, 9, 30], tiny.VOCABULARY)
    value, _, grads = reference.step(engine.network, reference.padded(made))
    said = engine.keep_frozen(102, 2.0, PLENTY, tmp_path if where == "file" else None)
    assert said is not None and "lower 2 of 3 blocks" in said
    assert ("on disk" if where == "file" else "in memory") in said
    calls, results = watched(engine), []
    for batch in (reference.padded(made), reference.padded(made), reference.batch([made[:2], made[2:]])):
        calls.clear()
        total, _, _, slopes = engine.value_and_grad(sft, batch)
        assert total.item() == pytest.approx(value.item(), rel=1e-6)
        assert reference.gradient_error(slopes, grads) < 1e-5
        results.append((total.item(), len(calls)))
    assert results[0][0] == results[1][0]
    assert [count for _, count in results] == [4 * 2 + 1, 1, 1]
    engine.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "tokens", "epochs", "limit"),
    [
        ({}, 1000, 1.0, PLENTY),  # no text is seen again
        ({}, 1000, 1.2, PLENTY),
        ({}, 1_000_000, 2.0, 10**6),  # next to none can be kept
        ({"layers": "all"}, 1000, 2.0, PLENTY),  # every block learns
        ({"type": "full", "layers": "all"}, 1000, 2.0, PLENTY),
    ],
)
def test_where_it_does_not_pay_all_stays_as_it_was(
    settings: dict[str, Any], tokens: int, epochs: float, limit: int
) -> None:
    engine = prepared(**settings)
    assert engine.keep_frozen(tokens, epochs, limit) is None
    assert engine._chain is not None and engine._chain._frozen is None
    engine.close()


def test_when_it_pays() -> None:
    assert pays(2, 1.0) and pays(1.5, 1.0) and pays(10, 0.5) and pays(3, 0.5)
    assert not pays(1, 1.0) and not pays(0.5, 1.0) and not pays(2, 0.2) and not pays(10, 0.1)


def test_a_full_disk_costs_time_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "free_space", lambda _: 2 * 2500)
    asked: list[int] = []

    def compute(tokens: mx.array) -> mx.array:
        asked.append(tokens.shape[1])
        return mx.broadcast_to(tokens[..., None].astype(mx.float32), (*tokens.shape, 8))

    states = FrozenStates(compute, PLENTY, tmp_path)
    batch = reference.padded(reference.samples([40, 30, 20], tiny.VOCABULARY))

    def rows() -> None:
        found = np.array(states.rows(batch))[0, :, 0]
        assert np.array_equal(found[:39], np.array(batch.tokens)[0, :39])

    rows()
    rows()
    assert len(asked) == 4  # half of the room is for two of the three
    states.close()

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            if self.file.tell() > 1000:
                raise OSError(errno.ENOSPC, "full")
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(frozen, "free_space", lambda _: PLENTY)
    states = FrozenStates(compute, PLENTY, tmp_path)
    states._file = Full(states._file)  # type: ignore[assignment]
    asked.clear()
    for _ in range(3):
        rows()
    assert len(asked) == 3 + 2 + 2  # one was written
    states.close()


@pytest.mark.parametrize("keep", [False, True])
def test_no_step_waits_for_what_is_in_flight(keep: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On an accelerator a step is sent and not waited for: if nothing that is sent is ever computed, no step asks for
    any of it."""
    pretend_accelerator(monkeypatch)
    engine = prepared()
    batch = reference.padded(reference.samples([230, 400, 90, 300], tiny.VOCABULARY))
    if keep:
        assert engine.keep_frozen(1020, 2.0, PLENTY, tmp_path)
    for _ in range(2):  # once it asks whether the model can pack; and the first epoch is written when the next begins
        mx.eval(engine.value_and_grad(sft, batch, mx.random.key(0)))

    def refuse(*_: Any) -> None:
        raise AssertionError("a step waits")

    monkeypatch.setattr(mx, "eval", refuse)
    monkeypatch.setattr(mx, "synchronize", refuse)
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    assert engine._chain is not None
    engine._chain.send = lambda *_: None
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    steps = [engine.value_and_grad(sft, batch, mx.random.key(number)) for number in range(2)]
    steps.append(engine.evaluate(sft, batch))  # type: ignore[arg-type]
    kept = 3 * 4 * 1020 * 32 * keep  # what is read of the file
    assert mx.get_peak_memory() - before < 60_000 + kept, "tokens and positions alone; a step takes megabytes"
    assert len(steps) == 3
    engine.close()
