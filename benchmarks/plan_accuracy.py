"""How near the peak and the duration that `train` foretells come to those that the run then measures.

    python benchmarks/plan_accuracy.py measure CELLS.jsonl [--families llama,qwen3] [--lengths 256,1024] [--kinds lora]
    python benchmarks/plan_accuracy.py table CELLS.jsonl
    python benchmarks/plan_accuracy.py measure TIMES.jsonl --steps 20 …     longer runs, for their durations
    python benchmarks/plan_accuracy.py durations TIMES.jsonl

Models have random weights and realistic proportions (hidden 128, 6 blocks, a vocabulary of 8,192), so that everything
fits a small machine: memory does not depend on what numbers there are. Each cell is a whole run of `finetune` in its
own process, validation and checkpoints included; what was measured before stands in CELLS.jsonl and is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COMMON: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 8_192, "max_position_embeddings": 16_384,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"query_pre_attn_scalar": 64, "sliding_window": 512, "sliding_window_pattern": 6},
    "phi3": {"num_key_value_heads": 2, "original_max_position_embeddings": 16_384, "head_dim": None},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 2,
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "head_dim": None,
        "moe_intermediate_size": 192,
    },
    "falcon_h1": {},
}
KINDS: dict[str, tuple[Any, int | None, int]] = {  # what learns, bits of the base, rows of a batch
    "lora": ("lora", None, 1), "qlora": ("lora", 4, 1), "full": ("full", None, 1), "uneven": ("lora", None, 4),
}  # fmt: skip
GRADES = ("products", "inputs")
LENGTHS = (256, 1024, 2048, 4096, 8192)


def hybrid() -> dict[str, Any]:
    """A small falcon_h1: attention and a state space in each block."""
    sys.path.insert(0, str(ROOT))
    from tests.architectures.small import OWN, SMALL

    small = {**SMALL, **OWN.get("falcon_h1", {}), **COMMON, "model_type": "falcon_h1"}
    for unknown in ("layers_block_type", "layer_types"):  # of other architectures; transformers refuses them
        small.pop(unknown, None)
    return small | {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16}


def model(place: Path, family: str, bits: int | None) -> None:
    """A model directory with random weights, quantized to `bits`."""
    sys.path.insert(0, str(ROOT))
    import mlx.core as mx
    import mlx.nn as nn

    from mlxlora import architecture, mlxlm
    from mlxlora.parameters import flat
    from tests import tiny

    changes = {name: value for name, value in {**COMMON, **FAMILIES[family]}.items() if value is not None}
    settings = hybrid() if family == "falcon_h1" else {**tiny.config(family), **changes}
    if family == "phi3":
        settings.pop("head_dim", None)
    place.mkdir()
    tiny.tokenizer(place)
    mx.random.seed(0)
    built = mlxlm.build(architecture.spelled_both_ways(settings))
    if bits:
        nn.quantize(built, group_size=64, bits=bits)
        settings["quantization"] = settings["quantization_config"] = {"group_size": 64, "bits": bits, "mode": "affine"}
    mx.save_safetensors(str(place / "model.safetensors"), flat(built.parameters()), {"format": "mlx"})
    (place / "config.json").write_text(json.dumps(settings))


def cell(family: str, kind: str, grade: Any, length: int, steps: int) -> dict[str, Any]:
    """One run: what was foretold and what was measured. steps: 0 for as few as show the peak."""
    sys.path.insert(0, str(ROOT))
    from mlxlora.adapters import AdapterConfig
    from mlxlora.data import SamplesConfig
    from mlxlora.finetune import finetune
    from mlxlora.training.config import TrainingConfig
    from mlxlora.training.events import Event, Finished, Started

    adapter, bits, rows = KINDS[kind]
    seen: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model(place / "model", family, bits)
        held_out = rows == 1 and length <= 1024
        words = [length] * 3 if rows == 1 else [length * part // 12 for part in (1, 2, 3, 12)]
        texts = [json.dumps({"text": f"{number} " + "lazy dog " * count}) for number, count in enumerate(words)]
        (place / "rows.jsonl").write_text("\n".join(texts))
        finetune(
            str(place / "model"), [str(place / "rows.jsonl")], place / "run",
            samples=SamplesConfig(max_length=length, validation_split=0.34 if held_out else 0.0, cache=place / "cache"),
            adapter=AdapterConfig(type=adapter, rank=16),
            training=TrainingConfig(steps=steps or (3 if rows > 1 else 2 if adapter == "full" or length <= 1024 else 1),
                                    batch_size=rows, checkpoint_blocks=grade),
            on_event=seen.append,
        )  # fmt: skip
    started = next(event for event in seen if isinstance(event, Started))
    finished = next(event for event in seen if isinstance(event, Finished))
    return {
        "family": family, "kind": kind, "grade": grade, "length": length, "foretold": started.predicted_peak,
        "measured": finished.peak_memory, "foretold_seconds": started.predicted_seconds, "seconds": finished.elapsed,
    }  # fmt: skip


def measure(results: Path, wanted: argparse.Namespace) -> None:
    """Measure the cells that are wanted and not yet in `results`, each in a process of its own."""
    known = {name(one) for one in read(results)} if results.exists() else set()
    for length in map(int, wanted.lengths.split(",")):
        for family in wanted.families.split(","):
            for kind in wanted.kinds.split(","):
                for grade in wanted.grades.split(","):
                    if (family, kind, grade, length) in known:
                        continue
                    words = [sys.executable, __file__, "cell", family, kind, grade, str(length), str(wanted.steps)]
                    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
                    if done.returncode:
                        print(f"{family} {kind} {grade} {length}: {done.stderr.strip()[-300:]}", file=sys.stderr)
                        continue
                    with results.open("a") as file:
                        file.write(done.stdout.splitlines()[-1] + "\n")
                    print(done.stdout.splitlines()[-1], flush=True)


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def name(one: dict[str, Any]) -> tuple[str, str, str, int]:
    return one["family"], one["kind"], one["grade"], one["length"]


def table(results: Path) -> None:
    """Print the table and its summary."""
    cells = {name(one): one for one in read(results)}
    lengths = sorted({length for *_, length in cells})
    print("| family | learns | base | keeps | " + " | ".join(f"{length:,}" for length in lengths) + " |")
    print("|---|---|---|---|" + "---:|" * len(lengths))
    for family in FAMILIES:
        for kind, (adapter, bits, rows) in KINDS.items():
            for grade in GRADES:
                here = [cells.get((family, kind, grade, length)) for length in lengths]
                if not any(here):
                    continue
                told = (
                    f"{one['foretold'] / one['measured']:.2f} ({one['measured'] / 1e6:,.0f} MB)" if one else ""
                    for one in here
                )
                base = f"{bits} bits" if bits else "float32"
                learns = f"{adapter}, {rows} uneven rows" if rows > 1 else adapter
                print(f"| {family} | {learns} | {base} | {grade} | " + " | ".join(told) + " |")
    ratios = [one["foretold"] / one["measured"] for one in cells.values()]
    within = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    print(
        f"\n{within} of {len(ratios)} within 10 % of the measured peak; median {statistics.median(ratios):.3f}, "
        f"from {min(ratios):.2f} to {max(ratios):.2f}."
    )


def durations(results: Path) -> None:
    """Print the durations and their summary."""
    cells = [one for one in read(results) if one.get("seconds")]
    print("| family | learns | keeps | tokens | foretold | measured | ratio |")
    print("|---|---|---|---:|---:|---:|---:|")
    for one in cells:
        told, took = one["foretold_seconds"], one["seconds"]
        what = f"{one['family']} | {one['kind']} | {one['grade']} | {one['length']:,}"
        print(f"| {what} | {told:.1f} s | {took:.1f} s | {told / took:.2f} |")
    ratios = [one["foretold_seconds"] / one["seconds"] for one in cells]
    print(
        f"\nForetold over measured duration of {len(ratios)} runs: median {statistics.median(ratios):.2f}, "
        f"from {min(ratios):.2f} to {max(ratios):.2f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "table", "durations", "cell"])
    parser.add_argument("words", nargs="+")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--grades", default=",".join(GRADES))
    parser.add_argument("--steps", type=int, default=0, help="of each run; by default as few as show its peak")
    wanted = parser.parse_args()
    if wanted.what == "cell":
        family, kind, grade, length, steps = wanted.words
        print(json.dumps(cell(family, kind, grade, int(length), int(steps))))
    elif wanted.what == "measure":
        measure(Path(wanted.words[0]), wanted)
    elif wanted.what == "durations":
        durations(Path(wanted.words[0]))
    else:
        table(Path(wanted.words[0]))


if __name__ == "__main__":
    main()
