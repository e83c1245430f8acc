"""QLoRA: train an adapter on a model of 8-bit weights, watch every event, and stop from a callback.

python examples/qlora_callback.py OUT
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from mlxlora import AdapterConfig, Control, OptimizerConfig, QuantizeConfig, TrainingConfig, convert, finetune
from mlxlora.demo.questions import training_questions
from mlxlora.demo.run import write_chats
from mlxlora.training.events import Event, Step, Validation


def main(out: Path, enough: float = 0.5, steps: int = 40) -> None:
    """Train until the loss is at most `enough`, at most `steps` steps."""
    out.mkdir(parents=True)
    with resources.as_file(resources.files("mlxlora.demo") / "model") as source:
        convert(str(source), out / "model", quantize=QuantizeConfig(bits=8, group_size=32))
    write_chats(out / "chats.jsonl", training_questions(120, seed=1))

    control = Control()

    def watch(event: Event) -> None:
        match event:
            case Step(step=step, loss=loss, tokens_per_second=speed):
                print(f"step {step}: loss {loss:.3f}, {speed:,.0f} tokens a second")
                if loss <= enough:
                    control.stop()  # what has been learned is saved
            case Validation(step=step, loss=loss):
                print(f"step {step}: validation loss {loss:.3f}")
            case _:
                pass

    result = finetune(
        str(out / "model"),
        [str(out / "chats.jsonl")],
        out / "run",
        adapter=AdapterConfig(rank=8),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        training=TrainingConfig(steps=steps, batch_size=4),
        on_event=watch,
        control=control,
    )
    print(result)


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "qlora")
    if out.exists():
        sys.exit(f"{out} exists. Say where to write: python {sys.argv[0]} OUT")
    main(out)
