"""Task metrics on answers whose score is known, and the bootstrap on differences whose worth is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlxlora.errors import ConfigError
from mlxlora.metrics import compare_scores, metric


@pytest.mark.parametrize(
    ("name", "answer", "expected", "score"),
    [
        ("exact", " 4  apples\n", "4 apples", 1.0),
        ("exact", "four apples", "4 apples", 0.0),
        ("contains", "The answer is 42.", "42", 1.0),
        ("contains", "The answer is 41.", "42", 0.0),
        ("regex:^SELECT .* FROM", "SELECT a FROM b", "", 1.0),
        ("regex:^SELECT .* FROM", "DELETE FROM b", "", 0.0),
        ("json", '{"a": [1, 2]}', "", 1.0),
        ("json", "{'a': 1}", "", 0.0),
        ("json", "[" * 100_000, "", 0.0),
        ("json-equal", '{"a": 1, "b": 2}', '{"b": 2, "a": 1}', 1.0),
        ("json", "[NaN]", "", 0.0),
        ("json-equal", '{"a": 1}', '{"a": 2}', 0.0),
        ("json-equal", '{"a": [1]}', '{"a": [true]}', 0.0),
        ("json-equal", '{"a": [1.0, false, null]}', '{"a": [1, false, null]}', 1.0),
        ("json-equal", '{"a": [1]}', '{"a": [1, 2]}', 0.0),
        ("json-equal", "NaN", "NaN", 0.0),
        ("number", "that makes 1,234.50 in all", "1234.5", 1.0),
        ("number:0.01", "about 101", "100", 1.0),
        ("number:0.001", "about 101", "100", 0.0),
        ("number", "none", "7", 0.0),
        ("rouge-l", "the cat sat", "the cat sat", 1.0),
        ("rouge-l", "the dog sat", "the cat sat", 2 / 3),
        ("rouge-l", "sat cat the", "the cat sat", 1 / 3),
        ("rouge-l", "", "the cat", 0.0),
    ],
)
def test_scores(name: str, answer: str, expected: str, score: float) -> None:
    assert metric(name)(answer, expected) == pytest.approx(score)


def test_own_function_and_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metric_module.py").write_text(
        "def half(answer, expected):\n    return 0.5\ndef forgot(answer, expected):\n    answer == expected\n"
    )
    monkeypatch.chdir(tmp_path)
    assert metric("my_metric_module:half")("a", "b") == 0.5
    with pytest.raises(ConfigError, match="my_metric_module:forgot failed on the answer 'a': TypeError"):
        metric("my_metric_module:forgot")("a", "b")
    pytest.importorskip("jsonschema")
    (tmp_path / "schema.json").write_text(json.dumps({"type": "object", "required": ["name"]}))
    score = metric("json-schema:schema.json")
    assert score('{"name": 1}', "") == 1.0 and score('{"nam": 1}', "") == 0.0 and score("no", "") == 0.0


@pytest.mark.parametrize(
    "name",
    [
        "exakt",
        "regex:(",
        "number:much",
        "no_such_module_x:f",
        "math:no_such_function",
        "regex",
        "regex:",
        "json-schema:",
        "json:x",
    ],
)
def test_unknown_metrics_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        metric(name)


def test_verdicts() -> None:
    random = np.random.default_rng(1)
    noise = random.normal(size=200)
    same = compare_scores(noise, noise + random.normal(size=200) * 0.5)
    assert same.verdict == "cannot tell" and same.low < 0 < same.high
    assert compare_scores(noise, noise + 0.5 + random.normal(size=200)).verdict == "better"
    assert compare_scores(noise, noise - 0.5 + random.normal(size=200)).verdict == "worse"
    assert compare_scores(noise, noise - 0.5, lower_is_better=True).verdict == "better"
    weighted = compare_scores([1.0, 0.0], [0.0, 0.0], weights=[3.0, 1.0])
    assert weighted.base == 0.75 and weighted.difference == -0.75
    assert compare_scores([0.0, 1.0], [1.0, 1.0]) == compare_scores([0.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="same length"):
        compare_scores([1.0], [])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(100):
        base = random.normal(size=60)
        found = compare_scores(base, base + 0.3 + random.normal(size=60), resamples=300)
        hits += found.low <= 0.3 <= found.high
    assert 86 <= hits <= 100
