"""Running contestants side by side: one process each, one step at a time in turn, medians of what they took."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.contestants import Timing, enter, measure
from benchmarks.resident import forget_peak, peak, resident
from benchmarks.scenarios import PEFT, RANK, Arrays, LeftOut, Scenario

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
    except ImportError as missing:
        connection.send(f"left out: {missing.name} is not installed")
    except LeftOut as reason:
        connection.send(str(reason))
    except Exception as failure:  # whatever it was, the other contestants go on
        connection.send(f"{type(failure).__name__}: {failure}")


def _measure_torch(contestant: Any) -> Timing:
    before = resident()
    forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    trained = contestant.step()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu, peak() - before, trained)


@contextmanager
def _usual_malloc() -> Iterator[None]:
    """Processes that start meanwhile give memory back as libc has it, so that what a process grows by is what it
    needs."""
    settings = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("MALLOC_")}
    try:
        yield
    finally:
        os.environ.update(settings)


class _Entrant:
    def __init__(self, name: str, scenario: Scenario, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, scenario, dtype), daemon=True)
        with _usual_malloc() if name == PEFT else nullcontext():
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
    # before and after each step, for no processor runs at one speed
    rate = product_rate(scenario.hidden, DTYPES[dtype])
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
                before, rate = rate, product_rate(scenario.hidden, DTYPES[dtype])
                if isinstance(timing, str):
                    results[name].failure = timing.splitlines()[0][:200]
                else:
                    seconds = spent(timing.wall, timing.cpu)
                    share = floor(scenario) / seconds / ((before + rate) / 2)
                    results[name].timings.append({**asdict(timing), "floor_share": share})
    finally:
        for entrant in entrants.values():
            entrant.end()
    for name, result in results.items():
        for what in ("wall", "cpu", "memory", "trained", "floor_share"):
            values = [timing[what] for timing in result.timings]
            if values:
                setattr(result, what, statistics.median(values))
        _compare(result, next(iter(results.values())), gradients.get(name, {}), next(iter(gradients.values()), {}))
    return list(results.values())


def spent(wall: float, cpu: float) -> float:
    """The seconds that count: processor time, which other work on the machine hardly moves; on a GPU the clock."""
    return cpu if mx.default_device().type == mx.cpu else wall


def _compare(result: Result, first: Result, found: Arrays, expected: Arrays) -> None:
    result.loss_error = abs(result.loss - first.loss) / abs(first.loss)
    if expected and found:
        largest = max(float(np.linalg.norm(array)) for array in expected.values())
        result.gradient_error = max(
            float(np.linalg.norm(found[name] - array)) / max(float(np.linalg.norm(array)), 1e-3 * largest)
            for name, array in expected.items()
        )


def floor(scenario: Scenario) -> float:
    """FLOPs that a step cannot do without, in the blocks that carry adapters and in the head.

    A frozen matrix takes 2 per weight and token forward and 2 for the gradient of its input; an adapter's two matrices
    2 more for their own gradients. A query and a key that it sees take 4 per dimension forward and 8 for the gradients.
    The head counts for tokens with weight. Padding, and all that is no product of matrices, counts for nothing.
    """
    hidden, heads, key_heads = scenario.hidden, max(2, scenario.hidden // 64), max(1, scenario.hidden // 128)
    wide = 2 * hidden if scenario.experts else 3 * hidden  # of the two experts that are chosen, together
    sides = [(hidden, 128 * heads), (hidden, 128 * key_heads), (hidden, 128 * key_heads), (128 * heads, hidden)]
    sides += [(hidden, wide), (hidden, wide), (wide, hidden)]
    products = sum(4.0 * a * b + 6.0 * RANK * (a + b) for a, b in sides)
    pairs = sum(length * (length + 1) / 2 for length in scenario.lengths)
    trained = sum(length - max(1, round(length * scenario.prompt)) for length in scenario.lengths)
    blocks = products * sum(scenario.lengths) + 12.0 * 128 * heads * pairs
    return (scenario.last or scenario.layers) * blocks + 4.0 * hidden * scenario.vocabulary * trained


def product_rate(width: int, dtype: mx.Dtype) -> float:
    """FLOP a second of this machine's matrix product (1,024 rows): the median of five."""
    x, w = mx.random.normal((1024, width)).astype(dtype), mx.random.normal((3 * width, width)).astype(dtype)
    mx.eval(x, w)
    mx.eval(x @ w.T)
    seconds = []
    for _ in range(5):
        wall, cpu = time.perf_counter(), time.process_time()
        mx.eval(x @ w.T)
        seconds.append(spent(time.perf_counter() - wall, time.process_time() - cpu))
    return 2.0 * 1024 * 3 * width * width / statistics.median(seconds)
