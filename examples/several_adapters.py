"""Several adapters on one loaded model: add them, turn them up and down between two answers, take them off again.

python examples/several_adapters.py OUT
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from mlxlora import AdapterConfig, OptimizerConfig, TrainingConfig, convert, finetune, load
from mlxlora.demo.questions import held_out_questions, training_questions
from mlxlora.demo.run import write_chats
from mlxlora.generate import SamplingConfig, complete


def main(out: Path, steps: int = 30) -> None:
    """Train two adapters, then answer one question under several mixtures of them."""
    out.mkdir(parents=True)
    with resources.as_file(resources.files("mlxlora.demo") / "model") as source:
        convert(str(source), out / "model", dtype="float32")
    for seed in (1, 2):
        write_chats(out / f"chats{seed}.jsonl", training_questions(200, seed=seed))
        finetune(
            str(out / "model"),
            [str(out / f"chats{seed}.jsonl")],
            out / f"run{seed}",
            adapter=AdapterConfig(rank=8),
            optimizer=OptimizerConfig(learning_rate=3e-3),
            training=TrainingConfig(steps=steps, seed=seed),
        )

    model = load(out / "model")
    one = model.adapters.add(out / "run1", name="one")
    model.adapters.add(out / "run2", name="two", scale=0.0)
    question = held_out_questions(1, seed=1)[0]
    for scales in (
        {"one": 1.0, "two": 0.0},
        {"one": 0.0, "two": 1.0},
        {"one": 0.5, "two": 0.5},
        {"one": 0.0, "two": 0.0},
    ):
        model.adapters.set_scales(scales)
        answer = complete(model, question.messages(), SamplingConfig(max_tokens=40)).text
        print(f"{scales}: {answer}")
    one.scale = 1.0  # one scale at a time works too
    model.adapters.remove("two")
    print("left:", ", ".join(adapter.name for adapter in model.adapters))


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "several")
    if out.exists():
        sys.exit(f"{out} exists. Say where to write: python {sys.argv[0]} OUT")
    main(out)
