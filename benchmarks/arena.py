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

from benchmarks.contestants import enter, measure
from benchmarks.resident import give_back
from benchmarks.scenarios import RANK, Arrays, LeftOut, Scenario

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# What a process may hold while others have their turn. All wait side by side, and libc keeps what a step freed; given
# back, it costs the next step page faults. So little steps keep theirs, and those that fill the machine do not.
IDLE = 3 * 10**9


@dataclass
class Result:
    """What one contestant did in a scenario: medians, and how far its numbers are from the reference's.

    seconds:     of wall and cpu, what counts on this device
    memory:      bytes above the weights
    trained:     weight of the tokens trained on in those seconds
    floor_share: of the machine's rate of products, for the arithmetic that cannot be left out
    """

    name: str
    wall: float = float("nan")
    cpu: float = float("nan")
    seconds: float = float("nan")
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
        answer: Any = contestant.answer()
        give_back(IDLE)
        connection.send(answer)
        while connection.recv() == "step":
            timing = measure(contestant)
            mx.clear_cache()
            give_back(IDLE)
            connection.send(timing)
    except ImportError as missing:
        connection.send(f"left out: {missing.name} is not installed")
    except LeftOut as reason:
        connection.send(str(reason))
    except Exception as failure:  # whatever it was, the other contestants go on
        connection.send(f"{type(failure).__name__}: {failure}")


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
    # before and after each step, for no processor runs at one speed
    rate = product_rate(scenario.hidden, DTYPES[dtype])
    try:
        for name in scenario.entrants:
            results[name] = Result(name)
            entrant = _Entrant(name, scenario, dtype)
            answer = entrant.take()
            if isinstance(answer, str):
                results[name].failure = answer.splitlines()[0][:200]
                entrant.end()
            else:
                results[name].loss, found = answer
                if found:
                    gradients[name] = found
                entrants[name] = entrant
        for _ in range(repeats):
            for name, entrant in list(entrants.items()):
                timing = entrant.ask("step")
                before, rate = rate, product_rate(scenario.hidden, DTYPES[dtype])
                if isinstance(timing, str):
                    results[name].failure = timing.splitlines()[0][:200]
                    entrants.pop(name).end()
                else:
                    seconds = spent(timing.wall, timing.cpu)
                    needed = floor(scenario) * timing.trained / scenario.trained
                    share = needed / seconds / ((before + rate) / 2)
                    results[name].timings.append({**asdict(timing), "seconds": seconds, "floor_share": share})
    finally:
        for entrant in entrants.values():
            entrant.end()
    reference = next(iter(gradients), "")
    for name, result in results.items():
        for what in ("wall", "cpu", "seconds", "memory", "trained", "floor_share"):
            values = [timing[what] for timing in result.timings]
            if values:
                setattr(result, what, statistics.median(values))
        if name in gradients and name != reference:
            _compare(result, results[reference], gradients[name], gradients[reference])
    return list(results.values())


def spent(wall: float, cpu: float) -> float:
    """The seconds that count: processor time, which other work on the machine hardly moves; on a GPU the clock."""
    return cpu if mx.default_device().type == mx.cpu else wall


def _compare(result: Result, reference: Result, found: Arrays, expected: Arrays) -> None:
    result.loss_error = abs(result.loss - reference.loss) / abs(reference.loss)
    largest = max(float(np.linalg.norm(array)) for array in expected.values())
    result.gradient_error = max(
        float(np.linalg.norm(found[name] - array)) / max(float(np.linalg.norm(array)), 1e-3 * largest)
        for name, array in expected.items()
    )


def floor(scenario: Scenario) -> float:
    """FLOPs that training once on all samples cannot do without, in the blocks that carry adapters and in the head.

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
    blocks = products * sum(scenario.lengths) + 12.0 * 128 * heads * pairs
    return (scenario.last or scenario.layers) * blocks + 4.0 * hidden * scenario.vocabulary * scenario.trained


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
