"""What an exponential costs on a CPU: MLX's own and its power of two, the engine's and its power of two.

    python benchmarks/exponential.py [numbers]

Prints nanoseconds a number, the best of several runs over an array of float32.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import mlx.core as mx

from mlxlora.engine.device import settling
from mlxlora.engine.exponential import exponential, power_of_two

RUNS = 9


def nanoseconds(function: Callable[[mx.array], mx.array], x: mx.array) -> float:
    """The shortest time of a call, per number; the first call, which compiles, is among them."""
    times = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        mx.eval(function(x))
        times.append(time.perf_counter() - begun)
    return 1e9 * min(times) / x.size


def main() -> None:
    """Measure the four, on numbers as attention's scores have them."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1 << 20
    x = -10 * mx.random.uniform(shape=(count,), key=mx.random.key(0))
    mx.eval(x)
    two = mx.array(2.0)
    with mx.stream(mx.cpu), settling():
        print(f"mx.exp        {nanoseconds(mx.exp, x):5.1f} ns")
        print(f"mx.power of 2 {nanoseconds(lambda x: mx.power(two, x), x):5.1f} ns")
        print(f"exponential   {nanoseconds(exponential, x):5.2f} ns")
        print(f"power_of_two  {nanoseconds(power_of_two, x):5.2f} ns")


if __name__ == "__main__":
    main()
