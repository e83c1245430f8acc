"""What a chunk of the head costs where few positions carry weight: memory a logit, and time.

    python benchmarks/head.py [vocabulary]

A step of a model that is nearly all head (width 1,024, one narrow block), with the chunk that the engine chooses and
with shorter ones. Prints the peak above the weights, in bytes for each logit of all positions, and processor time as a
multiple of what the chosen chunk takes.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import mlx.core as mx
import mlx.nn as nn

from mlxlora import mlxlm
from mlxlora.adapters import AdapterConfig, inject
from mlxlora.data.sample import Batch
from mlxlora.engine import Engine, EngineConfig
from mlxlora.engine.token_loss import chunk_length
from mlxlora.objectives import sft

WIDTH, RUNS = 1024, 5


def model(vocabulary: int) -> nn.Module:
    """One block that hardly counts, and a tied head."""
    made = mlxlm.build(
        {
            "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": 1, "intermediate_size": 64,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-6,
            "vocab_size": vocabulary, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    inject(made, AdapterConfig(rank=2))
    mx.eval(made.parameters())
    return made


def measured(network: nn.Module, positions: int, vocabulary: int, chunk: int) -> tuple[float, float]:
    """(bytes a logit at the peak, median of the seconds) of a step."""
    engine = Engine(network, EngineConfig(compile="never", loss_chunk=chunk))
    tokens = mx.random.randint(0, vocabulary, (1, positions + 1), key=mx.random.key(0))
    batch = Batch(tokens[:, :-1], mx.arange(positions), tokens[0, 1:], mx.ones(positions))
    mx.eval(batch.tokens, batch.targets)
    seconds = []
    for _ in range(RUNS):
        mx.reset_peak_memory()
        before, begun = mx.get_active_memory(), time.process_time()
        mx.eval(engine.value_and_grad(sft, batch))
        seconds.append(time.process_time() - begun)
    peak = mx.get_peak_memory() - before
    engine.close()
    return peak / positions / vocabulary, statistics.median(seconds)


def main() -> None:
    """The chosen chunk, and what others would cost."""
    vocabulary = int(sys.argv[1]) if len(sys.argv) > 1 else 151_936
    network = model(vocabulary)
    print(f"vocabulary {vocabulary:,}")
    print("positions  chunk  bytes a logit  time")
    for positions in (32, 64, 96, 256):
        chosen = chunk_length(positions, vocabulary, linear=True)
        first = 0.0
        for chunk in dict.fromkeys((chosen, chosen // 2, chosen // 4)):
            size, seconds = measured(network, positions, vocabulary, chunk)
            first = first or seconds
            mark = "  (chosen)" if chunk == chosen else ""
            print(f"{positions:9}  {chunk:5}  {size:13.2f}  {seconds / first:4.2f}{mark}", flush=True)


if __name__ == "__main__":
    main()
