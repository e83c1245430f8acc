"""The benchmarks run, and compare like with like: small, in one process, for what they compute and not for how fast."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import __main__ as verb
from benchmarks import arena
from benchmarks.arena import Result, _compare, compete, spent
from benchmarks.contestants import enter, measure
from benchmarks.scenarios import PEFT, SCENARIOS, SHIPPED, STEP, LeftOut, Scenario
from tests.machines import pretend_accelerator

STEPS = [name for name in SCENARIOS if name not in ("trainers", "16k")]


@pytest.fixture(params=["CPU", "accelerator"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on Metal and CUDA."""
    if request.param == "accelerator":
        pretend_accelerator(monkeypatch)


def small(name: str) -> Scenario:
    """Of the same kind, but a few dozen tokens wide and long."""
    whole = SCENARIOS[name]
    lengths = tuple(max(12, length // 16 if length < 2000 else 96) for length in whole.lengths[:6])
    layers = min(whole.layers, 2)
    changes: Any = {"samples": 6} if whole.samples else {}
    return replace(
        whole.smaller(64), lengths=lengths, layers=layers, vocabulary=512, last=min(whole.last, 1), **changes
    )


def agreement(contestant: Any, first: Any) -> tuple[float, float]:
    """Of loss and gradients, as the table has them."""
    (loss, grads), (wanted, expected) = contestant.answer(), first.answer()
    found, of_first = Result("", loss=loss), Result("", loss=wanted)
    _compare(found, of_first, grads, expected)
    return found.loss_error, found.gradient_error


@pytest.mark.parametrize("name", ["vocabulary", "last-quarter", "4-bit", "moe"])
def test_ours_gives_the_numbers_of_the_incumbent(name: str) -> None:
    scenario = small(name)
    first = enter(STEP, scenario, mx.float32)
    for ours in scenario.ours:
        contestant = enter(ours, scenario, mx.float32)
        loss, gradients = agreement(contestant, first)
        assert loss < 1e-6 and gradients < 2e-5
        assert measure(contestant).trained == measure(first).trained > 0


@pytest.mark.usefixtures("machine")
def test_what_a_gpu_is_measured_in() -> None:
    """bfloat16, and 4 bits beside it."""
    scenario = small("4-bit")
    loss, gradients = agreement(enter("ours products", scenario, mx.bfloat16), enter(STEP, scenario, mx.bfloat16))
    assert loss < 5e-3 and gradients < 0.2


def test_whole_trainers_learn_from_the_same_samples() -> None:
    scenario = small("trainers")
    trained = {measure(enter(name, scenario, mx.float32)).trained for name in (SHIPPED, *scenario.ours)}
    assert len(trained) == 1


def test_a_gpu_is_timed_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spent(2.0, 5.0) == 5.0
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert spent(2.0, 5.0) == 2.0
    with pytest.raises(LeftOut, match="on a CPU"):
        enter(PEFT, small("chat"), mx.float32)


def test_table_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A contestant that cannot run takes its row and nothing else; what was not measured is null."""

    class Here:
        """An entrant without a process of its own."""

        def __init__(self, name: str, scenario: Scenario, dtype: str) -> None:
            self.contestant = None if name == PEFT else enter(name, scenario, arena.DTYPES[dtype])

        def take(self) -> Any:
            return self.contestant.answer() if self.contestant else "left out: torch is not installed"

        def ask(self, _: str) -> Any:
            return measure(self.contestant)  # type: ignore[arg-type]

        def end(self) -> None:
            pass

    monkeypatch.setattr(arena, "_Entrant", Here)
    monkeypatch.setitem(SCENARIOS, "chat", replace(small("chat"), against=(STEP, PEFT)))
    monkeypatch.setitem(SCENARIOS, "trainers", small("trainers"))
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "chat,trainers", "--repeats", "1", "--json", str(out)])
    assert verb.main() == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and len(rows) == 2 + 4 + 2
    assert rows[3][2].strip() == "left out: torch is not installed"
    assert all(cell.strip() for cell in rows[4])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(out.read_text(), parse_constant=refuse)["scenarios"]
    assert found["chat"][2]["gradient_error"] < 2e-5 and found["trainers"][0]["loss"] is None
    assert found["chat"][1]["failure"] and not math.isnan(found["chat"][0]["floor_share"])


def test_where_nobody_can_run_there_is_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nobody:
        def __init__(self, *_: Any) -> None:
            pass

        def take(self) -> str:
            return "out of memory"

        def end(self) -> None:
            pass

    monkeypatch.setattr(arena, "_Entrant", Nobody)
    found = compete(small("chat"), 1)
    assert {one.failure for one in found} == {"out of memory"} and all(np.isnan(one.floor_share) for one in found)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's call into transformers
@pytest.mark.parametrize("name", [name for name in STEPS if PEFT in SCENARIOS[name].against])
def test_pytorch_computes_the_same_step(name: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    scenario = small(name)
    loss, gradients = agreement(enter(PEFT, scenario, mx.float32), enter("ours products", scenario, mx.float32))
    assert loss < 1e-5 and gradients < 1e-4
