"""General abilities through lm-evaluation-harness: refused where it is missing, read rightly, and run where it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mlxlora import harness
from mlxlora.errors import ConfigError, UnsupportedError
from mlxlora.harness import Measured, difference, differences, measure, task_of
from mlxlora.model import load
from tests import tiny


def test_what_the_harness_tells_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "results": {
            "arc": {"alias": "arc", "sample_len": 9, "acc,none": 0.4, "acc_stderr,none": 0.01, "em,strict": 0.1,
                    "em_stderr,strict": "N/A"},
            "wiki": {"word_perplexity,none": 12.0, "word_perplexity_stderr,none": 0.5},
        },
        "higher_is_better": {"arc": {"acc": True, "em": True}, "wiki": {"word_perplexity": False}},
    }  # fmt: skip
    monkeypatch.setattr(harness, "run", lambda *_: told)
    base: Any = measure(object(), ["arc", "wiki"])  # type: ignore[arg-type]
    assert base["arc"].keys() == {"acc", "em (strict)"} and base["arc"]["acc"] == Measured(0.4, 0.01, True)
    assert not base["wiki"]["word_perplexity"].higher_is_better
    worse = {"wiki": {"word_perplexity": Measured(20.0, 0.5, False)}, "arc": {"acc": Measured(0.41, 0.01)}}
    found = differences(base, worse)
    assert found["wiki word_perplexity"].verdict == "worse" and found["arc acc"].verdict == "cannot tell"
    assert set(found) == {"wiki word_perplexity", "arc acc"}


def test_without_standard_errors_nothing_is_claimed() -> None:
    found = difference(Measured(0.1, float("nan")), Measured(0.9, 0.1))
    assert found.verdict == "cannot tell" and json.dumps(vars(found)).find("NaN") < 0


def test_missing_harness_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxlora.compare import compare

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'mlxlora\[harness\]'"):
        compare("nowhere", ["nothing"], Path("none"), harness=["arc_easy"])


def test_tasks_are_known_names_or_files(tmp_path: Path) -> None:
    assert task_of("arc_easy", ["arc_easy"]) == "arc_easy"
    with pytest.raises(ConfigError, match="Did you mean 'arc_easy'"):
        task_of("arc_eazy", ["arc_easy"])
    (tmp_path / "task.yaml").write_text("task: mine\n")
    assert task_of(str(tmp_path / "task.yaml"), []) == {"task": "mine"}
    (tmp_path / "other.yaml").write_text("model: mine\n")
    with pytest.raises(ConfigError, match="no 'task'"):
        task_of(str(tmp_path / "other.yaml"), [])


@pytest.mark.parity
def test_a_task_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    tiny.model_directory(tmp_path / "model", "llama")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"Say {n}", "answer": n % 2}) + "\n" for n in range(6)))
    (tmp_path / "task.yaml").write_text(
        f"""task: say
dataset_path: json
dataset_kwargs: {{data_files: '{rows}'}}
test_split: train
output_type: multiple_choice
doc_to_text: '{{{{question}}}}'
doc_to_choice: [yes indeed, not at all]
doc_to_target: '{{{{answer}}}}'
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    found = measure(load(tmp_path / "model"), [str(tmp_path / "task.yaml")], limit=4)
    assert 0 <= found["say"]["acc"].value <= 1 and found["say"]["acc"].error >= 0
