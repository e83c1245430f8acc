"""The benchmarks run, and compare like with like: small, in one process, for what they compute and not for how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import __main__ as verb
from benchmarks import arena, table
from benchmarks.arena import Result, _compare, compete, spent
from benchmarks.contestants import Timing, enter, measure
from benchmarks.scenarios import (
    INPUTS,
    PEFT,
    PEFT_CHECKPOINT,
    PRODUCTS,
    SCENARIOS,
    SHIPPED,
    STEP,
    TORCH,
    TRAINER,
    LeftOut,
    Scenario,
    samples,
)
from tests.machines import pretend_accelerator

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["CPU", "accelerator"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on Metal and CUDA."""
    if request.param == "accelerator":
        pretend_accelerator(monkeypatch)


def small(name: str) -> Scenario:
    """Of the same kind, but a few dozen tokens wide and long."""
    whole = SCENARIOS[name]
    lengths = tuple(max(12, length // 16 if length < 2000 else 96) for length in whole.lengths[:8])
    layers = min(whole.layers, 2)
    return replace(whole.smaller(64), lengths=lengths, layers=layers, vocabulary=512, last=min(whole.last, 1))


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
    for ours in (PRODUCTS, INPUTS):
        contestant = enter(ours, scenario, mx.float32)
        loss, gradients = agreement(contestant, first)
        assert loss < 1e-6 and gradients < 2e-5
        assert measure(contestant).trained == measure(first).trained > 0


@pytest.mark.usefixtures("machine")
def test_what_a_gpu_is_measured_in() -> None:
    """bfloat16, and 4 bits beside it."""
    scenario = small("4-bit")
    loss, gradients = agreement(enter(PRODUCTS, scenario, mx.bfloat16), enter(STEP, scenario, mx.bfloat16))
    assert loss < 5e-3 and gradients < 0.2


@pytest.mark.parametrize("name", ["trainers", "chat", "last-quarter"])
def test_whole_trainers_learn_from_the_same_samples_equally_often(name: str) -> None:
    scenario = small(name)
    for trainer in (SHIPPED, TRAINER):
        assert measure(enter(trainer, scenario, mx.float32)).trained == scenario.passes * scenario.trained
    assert scenario.trained == sum(sample.weights.sum() for sample in samples(scenario))


def test_their_trainer_sees_long_samples_whole() -> None:
    """Of its own accord it cuts them off at 2,048 tokens."""
    scenario = replace(small("16k"), lengths=(2300,), layers=1, prompt=0.95)
    assert measure(enter(SHIPPED, scenario, mx.float32)).trained == 115


def test_their_trainer_leaves_no_sample_out() -> None:
    with pytest.raises(ValueError, match="6 samples are no whole number of batches of 4"):
        replace(small("trainers"), lengths=(20,) * 6)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc, and what Linux says of a process")
def test_what_a_large_step_freed_is_not_kept_while_others_run() -> None:
    """In a process in which libc is told to keep everything, as in the Makefile."""
    script = """
import numpy as np
from benchmarks.resident import give_back, resident
start = resident()
rows = [np.ones(10_000) for _ in range(2500)]  # 200 MB in small arrays
last = np.ones(10_000)
del rows
kept = resident() - start
give_back(10**12)
assert kept > 150e6 and resident() - start > 150e6, kept
give_back(10**6)
assert resident() - start < 50e6, resident() - start
"""
    keep = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_THRESHOLD_": "1073741824"}
    subprocess.run([sys.executable, "-c", script], env={**os.environ, **keep}, cwd=ROOT, check=True)


def test_a_gpu_is_timed_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spent(2.0, 5.0) == 5.0
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert spent(2.0, 5.0) == 2.0
    for name in TORCH:
        with pytest.raises(LeftOut, match="on a CPU"):
            enter(name, small("chat"), mx.float32)


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
    monkeypatch.setitem(SCENARIOS, "chat", replace(small("chat"), entrants=(SHIPPED, STEP, PEFT, TRAINER, PRODUCTS)))
    monkeypatch.setitem(SCENARIOS, "trainers", small("trainers"))
    out, markdown, again = (tmp_path / name for name in ("found.json", "table.md", "again.md"))

    def run(*words: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "chat,trainers", *words])
        assert verb.main() == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

    rows = run("--repeats", "1", "--json", str(out), "--markdown", str(markdown))
    assert {len(row) for row in rows} == {len(table.COLUMNS)} and len(rows) == 2 + 5 + 2
    by_name = {row[1]: dict(zip(table.COLUMNS, row, strict=True)) for row in rows[2:7]}
    assert [row[0] for row in rows[2:]] == [
        "chat batch, prompts masked",
        "",
        "",
        "",
        "",
        "chat data, whole trainers",
        "",
    ]
    assert by_name[PEFT]["memory above the weights"] == "left out: torch is not installed"
    assert by_name[STEP]["against its step"] == "1 (1)" and not by_name[STEP]["against mlx-lm's trainer"]
    assert by_name[STEP]["loss"] == by_name[PRODUCTS]["loss"] and not by_name[STEP]["Δ loss"]
    assert not by_name[TRAINER]["loss"] and not by_name[TRAINER]["Δ gradients"]
    assert [name for name, cell in by_name[PRODUCTS].items() if not cell] == ["scenario", "against PyTorch + PEFT"]

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(out.read_text(), parse_constant=refuse)["scenarios"]
    assert found["chat"][4]["gradient_error"] < 2e-5 and found["trainers"][0]["loss"] is None
    assert found["chat"][2]["failure"] and found["chat"][0]["floor_share"] > 0

    # from what was written, without measuring: the same table
    monkeypatch.setattr(verb, "compete", None)
    assert run("--read", str(out), "--markdown", str(again)) == rows
    assert again.read_text() == markdown.read_text()


def test_the_table_compares_trained_tokens_in_the_same_time() -> None:
    """Runs over several epochs beside single steps, and memory as a fraction where it is less."""
    results = [
        Result(SHIPPED, seconds=8.0, memory=2.0e9, trained=400.0, floor_share=0.125),
        Result(STEP, seconds=1.0, memory=1.0e9, trained=100.0, loss=2.0, floor_share=0.25),
        Result(PEFT, failure="left out: torch is not installed"),
        Result(TRAINER, seconds=2.0, memory=1.0e9, trained=400.0, floor_share=0.5),
        Result(PRODUCTS, seconds=0.25, memory=5.0e8, trained=100.0, loss=2.0, loss_error=3e-8, gradient_error=4e-6),
    ]
    assert table.rows(small("chat"), results) == [
        "| chat batch, prompts masked | mlx-lm trainer | 2,000 MB | | 0.50 (2.0) | | 12 % | | | |",
        "| | mlx-lm step | 1,000 MB | | 1 (1) | | 25 % | 2.0000 | | |",
        "| | PyTorch + PEFT | left out: torch is not installed | | | | | | | |",
        "| | mlxlora trainer, `products` | 1,000 MB | 4.00 (1/2.0) | 2.00 (1/1.0) | | 50 % | | | |",
        "| | mlxlora, `products` | 500 MB | 8.00 (1/4.0) | 4.00 (1/2.0) | | | 2.0000 | 3e-8 | 4e-6 |",
    ]


def test_who_fails_in_a_turn_says_why_and_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Fails:
        def __init__(self, name: str, *_: Any) -> None:
            self.name = name

        def take(self) -> Any:
            return 1.0, {}

        def ask(self, _: str) -> Any:
            asked.append(self.name)
            return "MemoryError: too much" if self.name == STEP else Timing(1.0, 1.0, 1, 1.0)

        def end(self) -> None:
            pass

    monkeypatch.setattr(arena, "_Entrant", Fails)
    found = {one.name: one.failure for one in compete(replace(small("chat"), entrants=(STEP, PRODUCTS)), 2)}
    assert found == {STEP: "MemoryError: too much", PRODUCTS: ""}
    assert asked == [STEP, PRODUCTS, PRODUCTS]


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
@pytest.mark.parametrize("who", TORCH)
@pytest.mark.parametrize("name", [name for name in SCENARIOS if PEFT in SCENARIOS[name].entrants and name != "16k"])
def test_pytorch_computes_the_same_step(name: str, who: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    scenario = small(name)
    loss, gradients = agreement(enter(who, scenario, mx.float32), enter(PRODUCTS, scenario, mx.float32))
    assert loss < 1e-5 and gradients < 1e-4


@pytest.mark.parity
def test_pytorchs_memory_is_the_most_that_is_allocated_at_once() -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.torch_peft import allocated

    x = torch.zeros(1000, 1000)

    def run() -> None:
        doubled = x @ x  # 4 MB
        more = doubled @ x  # 8 MB at once
        del doubled
        (more @ x).sum()  # 8 MB again

    for _ in range(2):  # what was freed before and is given out again counts, too
        assert allocated(run) == pytest.approx(8e6, rel=0.001)


@pytest.mark.parity
@pytest.mark.skipif(sys.platform != "linux", reason="what Linux says of a process")
def test_pytorchs_memory_is_what_its_process_grows_by() -> None:
    """Where libc maps every array by itself; checkpointing takes less."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    script = """
import sys
from dataclasses import replace
import mlx.core as mx
from benchmarks.contestants import enter
from benchmarks.resident import forget_peak, peak, resident
from benchmarks.scenarios import SCENARIOS
step = enter(sys.argv[1], replace(SCENARIOS["text"].smaller(128), vocabulary=5000), mx.float32)
step.answer()
step.step()
before = resident()
forget_peak()
step.step()
print(step.peak, peak() - before)
"""
    found = {}
    for who in TORCH:
        command = [sys.executable, "-W", "ignore", "-c", script, who]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        said = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        counted, grown = map(int, said.split()[-2:])
        assert counted == pytest.approx(grown, rel=0.05)
        found[who] = counted
    assert found[PEFT_CHECKPOINT] < 0.8 * found[PEFT]
