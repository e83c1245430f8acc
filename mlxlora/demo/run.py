"""The demo: a small model learns to answer questions with SQL, from conversion to a quantized model that answers.

Every number is measured while it runs. The answers are scored by running them: see `mlxlora.demo.score`.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlora import files
from mlxlora.commands import command
from mlxlora.demo.questions import Question, held_out_questions, training_questions
from mlxlora.demo.score import is_right, run_query
from mlxlora.errors import ConfigError, InputError
from mlxlora.progress import Progress

if TYPE_CHECKING:
    from mlxlora.model import LanguageModel
    from mlxlora.training.events import Event


MARKER = "demo.json"  # what tells a folder of an earlier demo, which may be replaced, from a folder of somebody's own
RANK, LEARNING_RATE, BATCH_SIZE = 16, 3e-3, 8


@dataclass(frozen=True, slots=True)
class Stage:
    """One form of the model: its execution accuracy on the held-out questions and its size."""

    name: str
    right: int
    """questions whose SQL gave the right rows"""
    asked: int
    """all questions"""
    bytes: int
    """of its weight files"""
    seconds: float
    """that answering took"""

    @property
    def accuracy(self) -> float:
        """The share of the questions that was answered right."""
        return self.right / self.asked


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo measured."""

    out: Path
    """the folder that holds everything: data, models, the run"""
    stages: tuple[Stage, ...]
    """the model before training, with its adapter, fused, and quantized"""
    changed: int
    """held-out answers that quantizing the fused model to 8 bits changed"""
    question: str
    """one held-out question, with its tables"""
    before: str
    """the base model's answer to it"""
    after: str
    """the quantized model's answer"""
    rows: str
    """what that answer gives when it is run"""
    samples: int
    """chats that were trained on"""
    training_seconds: float
    seconds: float
    """of the whole demo"""

    def __str__(self) -> str:
        asked = self.stages[0].asked
        lines = [
            f"Text to SQL on {asked} held-out questions (tables, names and values that training never saw),",
            "scored by running the SQL:",
            "",
            "  model                      right      size",
        ]
        lines += [f"  {stage.name:24s} {stage.accuracy:6.1%}   {stage.bytes / 1e6:5.2f} MB" for stage in self.stages]
        lines += [
            "",
            f"LoRA on {self.samples:,} chats took {self.training_seconds:.0f} s, the whole demo {self.seconds:.0f} s.",
            f"Quantizing to 8 bits changed {self.changed} of {asked} answers.",
            "",
            *(f"  {line}" for line in self.question.splitlines()),
            f"  before: {self.before}",
            f"  after:  {self.after}",
            f"  run:    {self.rows}",
            "",
            f"next: {command('chat', model=self.out / 'deployed')}",
        ]
        return "\n".join(lines)


def demo(
    out: Path = Path("demo-run"),
    *,
    questions: int = 150,
    samples: int = 800,
    seed: int = 1,
    on_progress: Progress | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> DemoResult:
    """Fine-tune the embedded model from end to end, offline: convert, score, train, score, fuse, quantize, answer.

    Args:
        out: the folder to write; one of an earlier demo is replaced
        questions: how many held-out questions to score on
        samples: how many chats to train on
        seed: of the questions, of the data and of training

    Raises InputError when `out` holds something else than an earlier demo.
    """
    if questions < 1 or samples < 20:
        raise ConfigError(f"questions is {questions} and samples is {samples}; give at least 1 and 20.")
    if not 0 <= seed < 2**62:
        raise ConfigError(f"seed is {seed}, but must be from 0 to below 2**62.")
    start = time.perf_counter()
    out = Path(out)
    _prepare(out)
    asked = held_out_questions(questions, seed=seed)
    with resources.as_file(resources.files("mlxlora.demo") / "model") as source:
        steps = _Steps(out, source, asked, seed, on_progress, on_event)
        return steps.run(training_questions(samples, seed=seed), start)


def _prepare(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file. Choose another place for the demo.")
    files.refuse_unmakeable(out)
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise InputError(f"{out} holds something else than an earlier demo. Choose another place with --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / MARKER, {"about": "made by `mlxlora demo`; the next demo replaces this folder"})


def write_chats(path: Path, questions: Iterable[Question]) -> None:
    """Write questions with their SQL as a `messages` data set, one chat a line."""
    rows = [{"messages": [*q.messages(), {"role": "assistant", "content": q.sql}]} for q in questions]
    files.write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def answer_all(
    model: LanguageModel, questions: list[Question], on_done: Callable[[int], None] | None = None
) -> list[str]:
    """The model's likeliest answer to every question."""
    from mlxlora.demo.decoding import greedy
    from mlxlora.prompts import ChatPrompts

    write = ChatPrompts(model.tokenizer)
    prompts = [write(question.messages()).tokens for question in questions]
    end = model.tokenizer.eos_id
    assert end is not None  # the embedded tokenizer has one
    answers = greedy(model.network, prompts, end=end, on_done=on_done)
    return [model.tokenizer.decode(answer) for answer in answers]


class _Steps:
    """The steps of the demo over one folder."""

    def __init__(
        self,
        out: Path,
        source: Path,
        asked: list[Question],
        seed: int,
        on_progress: Progress | None,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.out, self.source, self.asked, self.seed = out, source, asked, seed
        self.on_progress, self.on_event = on_progress, on_event
        self.on_cpu = mx.default_device() == mx.cpu
        self.stages: list[Stage] = []

    def run(self, chats: list[Question], start: float) -> DemoResult:
        from mlxlora.convert import convert
        from mlxlora.fuse import fuse
        from mlxlora.quantize import QuantizeConfig

        base, run, fused, deployed = (self.out / name for name in ("base", "run", "fused", "deployed"))
        self._write_data(chats)
        # a CPU multiplies float32 through BLAS and packed weights slowly; on Metal the base stays quantized (QLoRA)
        form: dict[str, Any] = {"dtype": "float32"} if self.on_cpu else {"quantize": QuantizeConfig(bits=8)}
        convert(str(self.source), base, check=False, on_progress=self.on_progress, **form)
        before = self._score("base", base)
        seconds = self._train(base, run)
        self._score("base + adapter", base, adapter=run)
        fuse(str(base), [str(run)], fused, dequantize=not self.on_cpu)
        plain = self._score("fused", fused)
        convert(
            str(fused), deployed, dtype="bfloat16", quantize=QuantizeConfig(bits=8), check=False,
            on_progress=self.on_progress,
        )  # fmt: skip
        packed = self._score("fused, 8 bits", deployed)
        chosen = self._example(before, packed)
        question = self.asked[chosen]
        after = self._ask(deployed, question)
        return DemoResult(
            out=self.out,
            stages=tuple(self.stages),
            changed=sum(one != other for one, other in zip(plain, packed, strict=True)),
            question=question.prompt,
            before=before[chosen],
            after=after,
            rows=str(run_query(question.tables, after)),
            samples=len(chats),
            training_seconds=seconds,
            seconds=time.perf_counter() - start,
        )

    def _write_data(self, chats: list[Question]) -> None:
        data = self.out / "data"
        data.mkdir()
        write_chats(data / "train.jsonl", chats)
        write_chats(data / "valid.jsonl", training_questions(64, seed=self.seed + 1_000))
        write_chats(data / "test.jsonl", self.asked)

    def _train(self, base: Path, run: Path) -> float:
        from mlxlora.adapters import AdapterConfig
        from mlxlora.data.config import SamplesConfig
        from mlxlora.finetune import finetune
        from mlxlora.training.config import TrainingConfig
        from mlxlora.training.optimizer import OptimizerConfig

        result = finetune(
            str(base),
            [str(self.out / "data")],
            run,
            samples=SamplesConfig(max_length=256, cache=self.out / "cache"),
            adapter=AdapterConfig(rank=RANK, alpha=2.0 * RANK),
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_ratio=0.1),
            training=TrainingConfig(epochs=1, batch_size=BATCH_SIZE, seed=self.seed),
            on_event=self.on_event,
            on_progress=self.on_progress,
        )
        return result.seconds

    def _score(self, name: str, path: Path, adapter: Path | None = None) -> list[str]:
        """Answer the held-out questions, run the answers, and note how many are right."""
        from mlxlora.model import load
        from mlxlora.quantize import dequantize

        what, total, done = f"scoring: {name}", len(self.asked), 0

        def on_done(more: int) -> None:
            nonlocal done
            done += more
            if self.on_progress:
                self.on_progress(what, done, total)

        start = time.perf_counter()
        model = load(path, adapter=[str(adapter)] if adapter else [])
        if self.on_cpu and "quantization" in model.config:
            # the same rounded weights, multiplied through BLAS
            dequantize(model.network, model.config, mx.float32)
        if self.on_progress:
            self.on_progress(what, 0, total)
        answers = answer_all(model, self.asked, on_done)
        right = sum(is_right(q.tables, q.sql, answer) for q, answer in zip(self.asked, answers, strict=True))
        size = sum(file.stat().st_size for file in (adapter / "adapter" if adapter else path).glob("*.safetensors"))
        self.stages.append(Stage(name, right, total, size, time.perf_counter() - start))
        del model
        gc.collect()
        return answers

    def _example(self, before: list[str], after: list[str]) -> int:
        """A question to show: wrong before, right afterwards, about one table, and the longest SQL of those."""

        def worth(index: int) -> tuple[bool, bool, int]:
            q = self.asked[index]
            turned = is_right(q.tables, q.sql, after[index]) and not is_right(q.tables, q.sql, before[index])
            return turned, len(q.tables) == 1, len(q.sql)

        return max(range(len(self.asked)), key=worth)

    def _ask(self, path: Path, question: Question) -> str:
        """The deployed model's own answer, with its packed weights."""
        from mlxlora.model import load

        return answer_all(load(path), [question])[0]
