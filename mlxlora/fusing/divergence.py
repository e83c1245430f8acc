"""What a change does to a model's predictions, measured on text: a probe, and the divergence on it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora import data, probe
from mlxlora.adapters.inject import get_module, set_module
from mlxlora.data import SamplesConfig
from mlxlora.errors import DataError, InputError
from mlxlora.files import read_yaml

ROW = 512  # tokens of one row at most
MEASURED, CALIBRATING = 2048, 8192  # tokens in all at most


@dataclass(frozen=True, slots=True)
class ProbeText:
    """Token rows to measure on, and others to learn from how inputs are correlated.

    origin: where they come from, for people
    """

    measured: list[list[int]]
    calibration: list[list[int]]
    origin: str


def find_probe(model: Any, given: Path | None, runs: Sequence[Path]) -> ProbeText:
    """The rows of `given`; else the validation rows of the first of `runs` that is a run; else a built-in text.

    Raises DataError when `given` cannot be used.
    """
    if given is not None:
        splits = data.load(given, model.tokenizer, SamplesConfig(validation_split=0))
        rows = [list(map(int, sample.tokens)) for sample in splits.train]
        return _split(rows, str(given))
    for run in runs:
        if (config := run / "config.yaml").is_file():
            try:
                rows = _validation_rows(config, model)
            except InputError as error:
                return _built_in(model, f"built-in text, because the validation rows of {run} cannot be read: {error}")
            if rows:
                return _split(rows, f"validation rows of {run}")
            return _built_in(model, f"built-in text, because {run} has no validation rows")
    return _built_in(model, "built-in text; better: --probe FILE with rows like those the model will see")


def _validation_rows(path: Path, model: Any) -> list[list[int]]:
    """The validation split of a run, made again from its configuration."""
    config = read_yaml(path)
    known = {one.name for one in fields(SamplesConfig)}
    try:
        given = {name: value for name, value in config["samples"].items() if name in known}
        for name in ("validation", "cache"):
            if isinstance(given.get(name), str):
                given[name] = Path(given[name])
        places = config["data"]
        if places is None:
            raise ValueError("its rows were given in Python")
        splits = data.load(places, model.tokenizer, SamplesConfig(**given), seed=config["training"]["seed"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} does not say which data the run used ({type(error).__name__}: {error}).") from None
    return [list(map(int, sample.tokens)) for sample in splits.valid] if splits.valid is not None else []


def _built_in(model: Any, why: str) -> ProbeText:
    ids = [int(token) for token in model.tokenizer.hf.encode(probe.TEXT)]
    ids = [token for token in ids if 0 <= token < model.vocabulary]
    half = max(len(ids) // 2, 1)
    return ProbeText([ids[:half]], [ids[half:] or ids], why)


def _split(rows: list[list[int]], origin: str) -> ProbeText:
    """Every second row is measured on, the others calibrate, so that nothing is fitted to what it is judged by."""
    rows = [row[i : i + ROW] for row in rows for i in range(0, len(row), ROW)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise DataError(f"{origin}: no rows to measure on.")
    if len(rows) == 1:
        half = (len(rows[0]) + 1) // 2
        rows = [rows[0][:half], rows[0][half:]]
    return ProbeText(_up_to(rows[::2], MEASURED), _up_to(rows[1::2], CALIBRATING), origin)


def _up_to(rows: list[list[int]], limit: int) -> list[list[int]]:
    taken: list[list[int]] = []
    for row in rows:
        if limit < 2:
            break
        taken.append(row[:limit])
        limit -= len(row)
    return taken


@contextlib.contextmanager
def replaced(network: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    """Other modules in their places, for a while."""
    before = {path: get_module(network, path) for path in modules}
    try:
        for path, module in modules.items():
            set_module(network, path, module)
        yield
    finally:
        for path, module in before.items():
            set_module(network, path, module)


def measure(network: nn.Module, modules: dict[str, nn.Module], rows: Sequence[list[int]]) -> probe.Difference:
    """How far the network with `modules` in their places is from the network as it stands, over all `rows`."""
    parts = []
    for row in rows:
        reference = probe.log_probs(network, row)
        mx.eval(reference)
        with replaced(network, modules):
            other = probe.log_probs(network, row)
            mx.eval(other)
        parts.append(probe.compare(reference, other, row))
        del reference, other
        mx.clear_cache()
    return combined(parts)


def combined(parts: Sequence[probe.Difference]) -> probe.Difference:
    """One difference for several rows."""
    count = sum(part.tokens for part in parts)
    following = sum(part.tokens - 1 for part in parts) or 1

    def mean(name: str) -> float:
        return float(sum(getattr(part, name) * part.tokens for part in parts)) / count

    def perplexity(name: str) -> float:
        return math.exp(sum(math.log(getattr(part, name)) * (part.tokens - 1) for part in parts) / following)

    return probe.Difference(
        tokens=count,
        kl=mean("kl"),
        largest=max(part.largest for part in parts),
        agreement=mean("agreement"),
        reference_perplexity=perplexity("reference_perplexity"),
        perplexity=perplexity("perplexity"),
    )
