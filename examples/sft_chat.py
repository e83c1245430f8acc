"""Fine-tune on conversations: the shortest way from a file of chats to a model that has learned from it.

    python examples/sft_chat.py OUT

Uses the model and the questions that mlxlora brings along; put your own model and file in their places.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from mlxlora import AdapterConfig, OptimizerConfig, SamplesConfig, TrainingConfig, convert, finetune, load
from mlxlora.demo.questions import held_out_questions, training_questions
from mlxlora.demo.run import write_chats
from mlxlora.generate import complete


def main(out: Path, steps: int = 60) -> None:
    """Convert, train, and ask the tuned model a question it has not seen."""
    out.mkdir(parents=True)
    with resources.as_file(resources.files("mlxlora.demo") / "model") as source:
        convert(str(source), out / "model", dtype="float32")
    write_chats(out / "chats.jsonl", training_questions(400, seed=1))

    result = finetune(
        str(out / "model"),
        [str(out / "chats.jsonl")],
        out / "run",
        samples=SamplesConfig(validation_split=0.1),
        adapter=AdapterConfig(rank=16, targets=["all-linear"]),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine"),
        training=TrainingConfig(steps=steps, batch_size=8),
    )
    print(result)

    question = held_out_questions(1, seed=1)[0]
    model = load(out / "model", adapter=[str(result.run)])
    print(question.prompt)
    print("expected:", question.sql)
    print("answered:", complete(model, question.messages()).text)


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "sft-chat")
    if out.exists():
        sys.exit(f"{out} exists. Say where to write: python {sys.argv[0]} OUT")
    main(out)
