"""How fast a large chat data set is tokenised, in how much memory, and how fast the second run is.

    python benchmarks/data.py [rows]

Prints one line of JSON: rows, seconds of the first and the second run, and the peak of resident memory above the start.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["TOKENIZERS_PARALLELISM"] = "true"

from benchmarks.resident import resident
from mlxlora.data import BatchConfig, SamplesConfig, load, plan_epoch
from mlxlora.tokenizer import Tokenizer
from tests import tiny

WORDS = [*"abcdefgh", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "in", "Paris", "France", "is"]


def rows(count: int) -> Iterator[str]:
    """Short questions and answers."""
    words = random.Random(0)
    for number in range(count):
        asked = " ".join(words.choices(WORDS, k=words.randint(3, 8)))
        said = " ".join(words.choices(WORDS, k=words.randint(2, 8)))
        talk = [{"role": "user", "content": f"{asked} {number}"}, {"role": "assistant", "content": said}]
        yield json.dumps({"messages": talk}) + "\n"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        with path.open("w") as file:
            file.writelines(rows(count))
        tokenizer = Tokenizer.load(tiny.tokenizer(Path(folder, "model")))
        tokenizer.encode("warm")
        config = SamplesConfig(cache=Path(folder, "cache"))
        start, peak, seconds = resident(), 0, []

        def look(_what: str, _done: int, _total: int) -> None:
            nonlocal peak
            peak = max(peak, resident())

        for _ in range(2):
            begin = time.perf_counter()
            splits = load(path, tokenizer, config, on_progress=look)
            seconds.append(round(time.perf_counter() - begin, 2))
        plan = plan_epoch(splits.train.lengths, BatchConfig(), seed=0, epoch=0)
        peak = max(peak, resident())
    print(
        json.dumps(
            {
                "rows": count, "first_seconds": seconds[0], "second_seconds": seconds[1],
                "peak_mb_above_start": round((peak - start) / 1e6), "batches": len(plan),
                "padding": round(1 - float(splits.train.lengths.sum()) / plan.tokens, 4),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
