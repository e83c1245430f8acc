"""Running contestants side by side: one process each, one step at a time in turn, medians of what they took."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.contestants import Arrays, Timing, enter, measure
from benchmarks.scenarios import PEFT, Scenario

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass
class Result:
    """What one contestant did in a scenario: medians, and how far its numbers are from the first contestant's."""

    name: str
    wall: float = float("nan")
    cpu: float = float("nan")
    memory: float = float("nan")
    trained: float = float("nan")
    loss: float = float("nan")
    loss_error: float = float("nan")
    gradient_error: float = float("nan")
    floor_share: float = float("nan")
    failure: str = ""
    timings: list[dict[str, float]] = field(default_factory=list)


def _serve(connection: Connection, name: str, scenario: Scenario, dtype: str) -> None:
    """The loop of a contestant's process."""
    try:
        contestant = enter(name, scenario, DTYPES[dtype])
        connection.send(contestant.answer())
        while connection.recv() == "step":
            connection.send(_measure_torch(contestant) if name == PEFT else measure(contestant))
    except Exception as failure:  # whatever it was, the other contestants go on
        connection.send(f"{type(failure).__name__}: {failure}")


def _measure_torch(contestant: Any) -> Timing:
    from benchmarks.torch_peft import forget_peak, peak, resident

    before = resident()
    forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    trained = contestant.step()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu, peak() - before, trained)


class _Entrant:
    def __init__(self, name: str, scenario: Scenario, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, scenario, dtype), daemon=True)
        self.process.start()
        theirs.close()

    def take(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            return "the process ended (out of memory?)"

    def ask(self, what: str) -> Any:
        try:
            self.pipe.send(what)
        except OSError:
            return f"the process ended (exit {self.process.exitcode}; out of memory?)"
        return self.take()

    def end(self) -> None:
        self.process.terminate()
        self.process.join()


def compete(scenario: Scenario, repeats: int, dtype: str = "float32") -> list[Result]:
    """Run a scenario: all contestants warm up, then take turns `repeats` times."""
    results: dict[str, Result] = {}
    entrants: dict[str, _Entrant] = {}
    gradients: dict[str, Arrays] = {}
    try:
        for name in (*scenario.against, *scenario.ours):
            results[name] = Result(name)
            entrant = _Entrant(name, scenario, dtype)
            answer = entrant.take()
            if isinstance(answer, str):
                results[name].failure = answer.splitlines()[0][:200]
                entrant.end()
            else:
                results[name].loss, gradients[name] = answer
                entrants[name] = entrant
        for _ in range(repeats):
            for name, entrant in entrants.items():
                timing = entrant.ask("step")
                if isinstance(timing, str):
                    results[name].failure = timing.splitlines()[0][:200]
                else:
                    results[name].timings.append(asdict(timing))
    finally:
        for entrant in entrants.values():
            entrant.end()
    for name, result in results.items():
        for what in ("wall", "cpu", "memory", "trained"):
            values = [timing[what] for timing in result.timings]
            if values:
                setattr(result, what, statistics.median(values))
        _compare(result, next(iter(results.values())), gradients.get(name, {}), next(iter(gradients.values()), {}))
    rate = product_rate(scenario.hidden)
    for result in results.values():
        result.floor_share = floor(scenario) / rate / result.cpu
    return list(results.values())


def _compare(result: Result, first: Result, found: Arrays, expected: Arrays) -> None:
    result.loss_error = abs(result.loss - first.loss) / abs(first.loss)
    if expected and found:
        largest = max(float(np.linalg.norm(array)) for array in expected.values())
        result.gradient_error = max(
            float(np.linalg.norm(found[name] - array)) / max(float(np.linalg.norm(array)), 1e-3 * largest)
            for name, array in expected.items()
        )


def floor(scenario: Scenario) -> float:
    """FLOPs that a step cannot do without: 4 per weight of the blocks and token (6 per layer that feeds no adapter: 2).

    A frozen matrix takes 2 forward and 2 for the gradient of its input; below the first adapted block only the former.
    The head counts for tokens with weight. Padding and attention are left out, so the share is understated.
    """
    hidden, heads = scenario.hidden, max(2, scenario.hidden // 64)
    attention = hidden * 128 * (2 * heads + 2 * max(1, hidden // 128))
    mlp = 3 * hidden * (2 * hidden if scenario.experts else 3 * hidden)
    tokens = sum(scenario.lengths)
    trained = sum(length - max(1, round(length * scenario.prompt)) for length in scenario.lengths)
    adapted = scenario.last or scenario.layers
    return 4.0 * adapted * (attention + mlp) * tokens + 4.0 * hidden * scenario.vocabulary * trained


def product_rate(width: int) -> float:
    """FLOP a second of this machine's float32 matrix product (1,024 rows), by processor time."""
    x, w = mx.random.normal((1024, width)), mx.random.normal((3 * width, width))
    mx.eval(x, w)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        mx.eval(x @ w.T)
        best = min(best, time.process_time() - start)
    return 2.0 * 1024 * 3 * width * width / best
