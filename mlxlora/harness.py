"""General abilities: tasks of lm-evaluation-harness on base and tuned, by way of mlx-lm's adapter. Did it forget?"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora import mlxlm
from mlxlora.errors import ConfigError, UnsupportedError, nearest
from mlxlora.files import read_yaml
from mlxlora.metrics import Difference, Verdict
from mlxlora.model import LanguageModel
from mlxlora.prompts import chat_tokenizer

NO_SCORES = ("alias", "sample_len", "sample_count")  # what the harness tells beside metrics
Scores = dict[str, dict[str, "Measured"]]


@dataclass(frozen=True)
class Measured:
    """One metric of one task: its value, its standard error, and which way is better."""

    value: float
    error: float
    higher_is_better: bool = True


def refuse_missing() -> None:
    """Raise UnsupportedError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedError(
            "harness: lm-evaluation-harness is not installed. Get it with: pip install 'mlxlora[harness]'"
        )


def measure(model: LanguageModel, tasks: list[str], *, limit: int | None = None) -> Scores:
    """Every metric of `tasks`, by task, for the model as it stands now.

    tasks: names that the harness knows, or YAML files with a task of your own
    limit: at most so many questions of each task

    Raises ConfigError for a task that the harness does not have.
    """
    found = run(model, tasks, limit)
    better: dict[str, dict[str, bool]] = found.get("higher_is_better", {})
    scores: Scores = {}
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if metric.endswith("_stderr") or metric in NO_SCORES or not _number(value):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            title = metric if filtered in ("", "none") else f"{metric} ({filtered})"
            up = better.get(task, {}).get(metric)
            scores.setdefault(task, {})[title] = Measured(
                float(value), float(error) if _number(error) else math.nan, up is not False
            )
    return scores


def run(model: LanguageModel, tasks: Sequence[str], limit: int | None) -> Any:
    """The harness's own results. What it and mlx-lm's adapter print goes to stderr."""
    refuse_missing()
    with contextlib.redirect_stdout(sys.stderr):
        lm_eval = importlib.import_module("lm_eval")
        manager = importlib.import_module("lm_eval.tasks").TaskManager()
        wanted = [task_of(name, manager.all_tasks) for name in tasks]
        adapted = adapter_class()(model)
        return lm_eval.simple_evaluate(
            model=adapted, tasks=wanted, limit=limit, task_manager=manager,
            apply_chat_template=adapted.use_chat_template, log_samples=False,
        )  # fmt: skip


def task_of(name: str, known: Sequence[str]) -> Any:
    """A task as the harness takes it: its name, or what a YAML file says (read by our own reader: no code in it)."""
    if name.endswith((".yaml", ".yml")):
        content = read_yaml(Path(name))
        if not isinstance(content, dict) or "task" not in content:
            raise ConfigError(f"harness: {name} describes no task of lm-evaluation-harness: it has no 'task'.")
        return content
    if name not in known:
        raise ConfigError(f"harness: there is no task '{name}'.{nearest(name, known)} `lm_eval ls tasks` lists them.")
    return name


def adapter_class() -> Any:
    """mlx-lm's adapter class, for a network that is loaded already: all but its `__init__` is as it stands there."""
    base = mlxlm.module("evaluate").MLXLM

    class Loaded(base):  # type: ignore[misc, valid-type]
        def __init__(self, model: LanguageModel) -> None:
            super(base, self).__init__()
            self._model, self.tokenizer = model.network, chat_tokenizer(model)
            self._max_tokens, self._batch_size, self._sampler = None, 8, None
            self.use_chat_template = self.tokenizer.chat_template is not None

    return Loaded


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def differences(base: Scores, tuned: Scores) -> dict[str, Difference]:
    """Tuned against base by `task metric`, with an interval from the two standard errors.

    The harness tells no results by question, so the questions are not paired: the interval is wider than it could be.
    """
    return {
        f"{task} {metric}": difference(before, tuned[task][metric])
        for task, metrics in base.items()
        for metric, before in metrics.items()
        if metric in tuned.get(task, {})
    }


def difference(before: Measured, after: Measured) -> Difference:
    """The change of one metric; `cannot tell` where the 95 % interval holds 0 or there are no standard errors."""
    change = after.value - before.value
    both = math.hypot(before.error, after.error)
    reach = 1.96 * both if math.isfinite(both) else 0.0
    verdict: Verdict = "cannot tell"
    if math.isfinite(both) and abs(change) > reach:
        verdict = "better" if (change > 0) == before.higher_is_better else "worse"
    return Difference(before.value, after.value, change, change - reach, change + reach, verdict)
