"""Task metrics: a generated answer against the expected one, as a score from 0 to 1; and what a difference is worth.

exact            equal after trimming and collapsing white space
contains         the expected answer stands in the generated one
regex:PATTERN    the pattern is found in the answer
json             the answer is valid JSON
json-equal       ... and equal to the expected JSON value
json-schema:FILE ... and valid against a JSON schema
number:TOLERANCE the last number of the answer equals that of the expected one, relatively
rouge-l          F1 of the longest common subsequence of words
MODULE:FUNCTION  your own: function(answer, expected) → bool or number
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from mlxlora.errors import ConfigError, nearest
from mlxlora.files import read_json

Score: TypeAlias = Callable[[str, str], float]
Verdict: TypeAlias = Literal["better", "worse", "cannot tell"]

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def collapse(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def exact(answer: str, expected: str) -> float:
    """1 where both are equal after trimming and collapsing white space."""
    return float(collapse(answer) == collapse(expected))


def contains(answer: str, expected: str) -> float:
    """1 where the expected answer stands in the generated one."""
    return float(collapse(expected) in collapse(answer))


def strict(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is none, such as Python's NaN."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same one: 1 and 1.0 are, 1 and true are not, though Python says so."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def is_json(answer: str, expected: str) -> float:
    """1 where the answer is valid JSON."""
    try:
        strict(answer)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def json_equal(answer: str, expected: str) -> float:
    """1 where both are JSON and stand for the same value."""
    try:
        return float(same(strict(answer), strict(expected)))
    except (ValueError, RecursionError):
        return 0.0


def rouge_l(answer: str, expected: str) -> float:
    """F1 of the longest common subsequence of words, in small letters (Lin 2004)."""
    given, wanted = answer.lower().split(), expected.lower().split()
    if not given or not wanted:
        return float(given == wanted)
    row = [0] * (len(wanted) + 1)
    for word in given:
        diagonal = 0
        for place, other in enumerate(wanted, 1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return 2 * row[-1] / (len(given) + len(wanted))


def regex(argument: str) -> Score:
    """1 where the pattern is found."""
    try:
        pattern = re.compile(argument)
    except re.error as error:
        raise ConfigError(f"metric regex: '{argument}' is no regular expression: {error}.") from None
    return lambda answer, expected: float(pattern.search(answer) is not None)


def last_number(text: str) -> float | None:
    """The last number of a text, commas for thousands left out; None where there is none."""
    found = NUMBER.findall(text)
    try:
        return float(found[-1].replace(",", "")) if found else None
    except ValueError:
        return None


def number(argument: str) -> Score:
    """1 where the last number of the answer is the last number of the expected one, within a relative tolerance."""
    try:
        tolerance = float(argument or 1e-6)
    except ValueError:
        tolerance = -1.0
    if not 0 <= tolerance < 1:
        raise ConfigError(f"metric number: the tolerance is '{argument}', but must be a number from 0 to below 1.")

    def score(answer: str, expected: str) -> float:
        given, wanted = last_number(answer), last_number(expected)
        if given is None or wanted is None:
            return float(given is wanted)
        return float(math.isclose(given, wanted, rel_tol=tolerance, abs_tol=tolerance * 1e-3))

    return score


def json_schema(argument: str) -> Score:
    """1 where the answer is JSON that the schema accepts."""
    if importlib.util.find_spec("jsonschema") is None:
        raise ConfigError("metric json-schema needs the package jsonschema: pip install 'mlxlora[compare]'")
    jsonschema = importlib.import_module("jsonschema")
    schema = read_json(Path(argument))
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"metric json-schema: {argument} is no JSON schema: {error.message}.") from None
    validator = kind(schema)

    def score(answer: str, expected: str) -> float:
        try:
            return float(validator.is_valid(strict(answer)))
        except (ValueError, RecursionError):
            return 0.0

    return score


def own(module: str, name: str) -> Score:
    """A function of the user's, found from the current directory too."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ConfigError(f"metric {module}:{name}: the module cannot be imported: {error}.") from None
    except AttributeError:
        raise ConfigError(f"metric {module}:{name}: {module} has no '{name}'.") from None

    def score(answer: str, expected: str) -> float:
        try:
            return float(function(answer, expected))
        except Exception as error:  # whatever the user's function raises; --traceback shows where
            raise ConfigError(
                f"metric {module}:{name} failed on the answer {shown(answer)}: {type(error).__name__}: {error}."
            ) from error

    return score


def shown(text: str) -> str:
    """A text as part of a message."""
    return repr(text if len(text) <= 80 else f"{text[:79]}…")


PLAIN: dict[str, Score] = {
    "exact": exact, "contains": contains, "json": is_json, "json-equal": json_equal, "rouge-l": rouge_l,
}  # fmt: skip
WITH_ARGUMENT: dict[str, Callable[[str], Score]] = {"regex": regex, "number": number, "json-schema": json_schema}


def metric(name: str) -> Score:
    """The metric of that name; see the list at the top of this module. Raises ConfigError for any other."""
    if name in PLAIN:
        return PLAIN[name]
    head, _, argument = name.partition(":")
    if head in WITH_ARGUMENT and (argument or head == "number"):
        return WITH_ARGUMENT[head](argument)
    if argument and head not in PLAIN and head not in WITH_ARGUMENT:
        return own(head, argument)
    known = [*PLAIN, *WITH_ARGUMENT]
    raise ConfigError(
        f"there is no metric '{name}'.{nearest(name, known)} Known: {', '.join(PLAIN)}, "
        f"{', '.join(f'{one}:…' for one in WITH_ARGUMENT)}, or MODULE:FUNCTION."
    )


@dataclass(frozen=True)
class Difference:
    """Two scores of the same rows, and whether their difference is more than chance."""

    base: float
    tuned: float
    difference: float
    low: float
    high: float
    """the middle 95 % of the difference, by bootstrap over rows"""
    verdict: Verdict


def compare_scores(
    base: npt.ArrayLike,
    tuned: npt.ArrayLike,
    *,
    lower_is_better: bool = False,
    weights: npt.ArrayLike | None = None,
    resamples: int = 2000,
) -> Difference:
    """The paired difference of two lists of scores with its bootstrap interval (Efron 1979).

    weights: of the rows, such as their token counts when the scores are mean losses
    The verdict is `cannot tell` where the interval holds 0. Deterministic: the resampling has its own fixed seed.
    """
    one, other = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
    weight = np.ones(len(one)) if weights is None else np.asarray(weights, np.float64)
    if len(one) != len(other) or not len(one):
        raise ValueError(f"expected two lists of the same length above 0, found {len(one)} and {len(other)}")
    random = np.random.default_rng(0)
    means = np.empty(resamples)
    for turn in range(resamples):
        drawn = random.integers(0, len(one), len(one))
        means[turn] = np.average((other - one)[drawn], weights=weight[drawn]) if weight[drawn].sum() else 0.0
    low, high = (float(value) for value in np.quantile(means, [0.025, 0.975]))
    before, after = float(np.average(one, weights=weight)), float(np.average(other, weights=weight))
    verdict: Verdict = "cannot tell"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) != lower_is_better else "worse"
    return Difference(before, after, after - before, low, high, verdict)
