"""Make one adapter of several: weighted sums, exact or of a given rank, TIES and DARE."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxlora import files
from mlxlora.adapters.files import Adapter, Module, parse_spec, read_adapter, save_adapter
from mlxlora.commands import command
from mlxlora.errors import AdapterError, ConfigError, Problem, UnsupportedError
from mlxlora.progress import Progress

Method = Literal["sum", "ties", "dare"]
Array = npt.NDArray[np.float32]
EXTRA = 8  # directions more than asked for, and rounds of refinement, in the search for the largest ones
ROUNDS = 4
DENSITY = 0.5
NOTHING = 1e-12  # share of the factors' size below which what is left of their product is rounding


@dataclass(frozen=True)
class MergeResult:
    """What merging came to."""

    out: Path
    """the new adapter"""
    method: str
    adapters: dict[str, float]
    """the adapters that went in, with their weights"""
    modules: int
    """how many modules the new adapter changes"""
    rank: int
    """its largest rank"""
    error: float
    """what the rank could not hold: relative to the whole change, as Frobenius norms; 0 when it is exact"""
    worst: str
    """the module that lost most"""
    worst_error: float
    """what it lost"""

    def __str__(self) -> str:
        names = " + ".join(f"{weight:g} × {name}" for name, weight in self.adapters.items())
        lost = "exact"
        if self.error:
            lost = f"relative error {self.error:.2g} (most in {self.worst}: {self.worst_error:.2g})"
        return (
            f"{self.out}: {self.method} of {names}, {self.modules} modules, rank {self.rank}, {lost}\n\n"
            f"next: {command('chat', model='MODEL', adapter=self.out)}"
        )


def merge(
    adapter: list[str],
    out: Path,
    *,
    method: Method = "sum",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    any_base: bool = False,
    on_progress: Progress | None = None,
) -> MergeResult:
    """Make one LoRA adapter of several, each with a weight; a negative one takes its adapter away.

    sum adds the weighted changes: exactly, by setting the factors side by side, or cut to `rank`. ties keeps the
    largest entries of each change, elects a sign for each and averages those that agree
    (https://arxiv.org/abs/2306.01708). dare drops entries at random and scales up the rest
    (https://arxiv.org/abs/2311.03099). Where the rank cannot hold the result, the error is told.

    Args:
        adapter: adapters or runs, `PATH=WEIGHT` each (1 when left out)
        out: the adapter directory to write; it must not exist
        method: sum, ties or dare
        rank: rank of the result; when left out, the sum of the ranks
        density: share of the entries that ties and dare keep (default: 0.5)
        seed: for what dare drops
        any_base: merge adapters that were made for different models

    Raises:
        AdapterError: an adapter is damaged, or they do not belong together
        UnsupportedError: an adapter is no LoRA; `mlxlora fuse` folds any kind into a model
    """
    out = Path(out)
    _check_options(adapter, method, rank, density)
    density = DENSITY if density is None else density
    files.refuse_existing(out)
    given = [(spec, *parse_spec(spec)) for spec in adapter]
    read = [(read_adapter(path), weight) for _, path, weight in given]
    names = _names([path for _, path, _ in given])
    _refuse_others(names, [one for one, _ in read], any_base)
    paths = sorted({path for one, _ in read for path in one.modules})
    modules: dict[str, Module] = {}
    lost: dict[str, tuple[float, float]] = {}
    for done, path in enumerate(paths):
        parts = [(one.modules[path], weight) for one, weight in read if path in one.modules and weight]
        if parts:
            generator = np.random.default_rng(_seed(seed, path))
            modules[path], lost[path] = merged(parts, method, rank, density, generator)
        if on_progress:
            on_progress("merging", done + 1, len(paths))
    if not modules:
        raise ConfigError("All weights are 0: there is nothing to merge.")
    error, worst, worst_error = _errors(lost)
    first = read[0][0]
    weights = dict(zip(names, (weight for _, weight in read), strict=True))
    recipe = {
        "method": method,
        "weights": weights,
        "rank": rank,
        "density": None if method == "sum" else density,
        "seed": seed,
    }
    result = Adapter(
        "lora",
        modules,
        layers=max(one.layers for one, _ in read),
        base=first.base,
        base_name=first.base_name,
        config={"merged": recipe},
    )
    save_adapter(out, result)
    return MergeResult(out, method, weights, len(modules), max(result.ranks), error, worst, worst_error)


def _check_options(adapter: Sequence[str], method: str, rank: int | None, density: float | None) -> None:
    problems = []
    if not adapter:
        problems.append(Problem("adapter", "no adapter was given", "Name adapters or runs: PATH=WEIGHT"))
    if method not in ("sum", "ties", "dare"):
        problems.append(Problem("method", f"must be sum, ties or dare, not {method!r}"))
    if rank is not None and rank < 1:
        problems.append(Problem("rank", f"must be at least 1, not {rank}"))
    if density is not None and method == "sum":
        problems.append(Problem("density", "is of ties and dare, a sum keeps all", "Choose with --method"))
    elif density is not None and not 0 < density <= 1:
        problems.append(Problem("density", f"must lie above 0 and not above 1, not {density}"))
    if problems:
        raise ConfigError.of("These adapters cannot be merged like this:", problems)


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names of adapters, each once."""
    names: list[str] = []
    for path in paths:
        resolved = path.resolve()
        name = resolved.parent.name if resolved.name in ("adapter", "best") else resolved.name
        number = 2
        unique = name
        while unique in names:
            unique, number = f"{name}-{number}", number + 1
        names.append(unique)
    return names


def _refuse_others(names: Sequence[str], adapters: Sequence[Adapter], any_base: bool) -> None:
    """Raise when adapters are no LoRA, were made for different models, or differ in the shape of a module."""
    kinds = [f"{name} is {one.type}" for name, one in zip(names, adapters, strict=True) if one.type != "lora"]
    if kinds:
        raise UnsupportedError(
            f"Only LoRA adapters can be merged without their model: {', '.join(kinds)}. "
            "mlxlora fuse folds several adapters of any kind into a model, each with its weight."
        )
    problems = []
    bases = {name: one.base for name, one in zip(names, adapters, strict=True) if one.base}
    if len(set(bases.values())) > 1 and not any_base:
        told = ", ".join(f"{name}: {base[:12]}…" for name, base in bases.items())
        problems.append(Problem("base", f"they were made for different models ({told})", "To go on: --any_base"))
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, one in zip(names, adapters, strict=True):
        for path, module in one.modules.items():
            shape = _outer(module)
            if seen.setdefault(path, (name, shape))[1] != shape:
                first = seen[path]
                problems.append(Problem(path, f"has shape {list(shape)} in {name}, {list(first[1])} in {first[0]}"))
    if problems:
        raise AdapterError.of("These adapters do not belong together:", problems)


def _outer(module: Module) -> tuple[int, ...]:
    left, right = _factors(module, 1.0)
    shape = (left.shape[1], right.shape[2])
    return (left.shape[0], *shape) if module.arrays["lora_a"].ndim == 3 else shape


def _seed(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "big")


def _errors(lost: dict[str, tuple[float, float]]) -> tuple[float, str, float]:
    """Relative error of everything, and the module with the largest, of squared norms (lost, whole) by module."""
    missing, whole = sum(part for part, _ in lost.values()), sum(total for _, total in lost.values())
    shares = {path: (part / total) ** 0.5 if total else 0.0 for path, (part, total) in lost.items()}
    worst = max(shares, key=lambda path: shares[path])
    return ((missing / whole) ** 0.5 if whole else 0.0), worst, shares[worst]


# ---- one module ---------------------------------------------------------------------------------------------------


def merged(
    parts: Sequence[tuple[Module, float]],
    method: str,
    rank: int | None,
    density: float,
    generator: np.random.Generator,
) -> tuple[Module, tuple[float, float]]:
    """One module of the new adapter, and the squared norms of what its rank cannot hold and of the whole change."""
    stacked = parts[0][0].arrays["lora_a"].ndim == 3
    pairs = [_factors(module, weight * module.scale) for module, weight in parts]
    left = np.concatenate([pair[0] for pair in pairs], axis=2)
    right = np.concatenate([pair[1] for pair in pairs], axis=1)
    wanted = rank or left.shape[2]
    limit = min(wanted, left.shape[1], right.shape[2])
    if method == "sum":
        if left.shape[2] <= wanted:
            return _module(left, right, stacked), (0.0, 1.0)
        results = [_cut(a, b, limit) for a, b in zip(left, right, strict=True)]
    else:
        combine = _ties if method == "ties" else _dare
        results = []
        for expert in range(len(left)):
            changes = [_unweighted(pair, expert, weight) for pair, (_, weight) in zip(pairs, parts, strict=True)]
            total = combine(changes, [weight for _, weight in parts], density, generator)
            results.append(_largest(total, limit, generator))
    lost, whole = sum(r[2] for r in results), sum(r[3] for r in results)
    made = _module(np.stack([r[0] for r in results]), np.stack([r[1] for r in results]), stacked)
    return made, (max(lost, 0.0), whole)


def _factors(module: Module, factor: float) -> tuple[Array, Array]:
    """[E, in, r] and [E, r, out] whose product is the change times `factor` (E = 1 without experts)."""
    a, b = np.array(module.arrays["lora_a"]), np.array(module.arrays["lora_b"])
    if a.ndim == 3:
        a, b = a.transpose(0, 2, 1), b.transpose(0, 2, 1)
    else:
        a, b = a[None], b[None]
    return a, (b * factor).astype(np.float32)


def _module(left: Array, right: Array, stacked: bool) -> Module:
    """A module of scale 1 from factors as `_factors` gives them."""
    if stacked:
        left, right = left.transpose(0, 2, 1), right.transpose(0, 2, 1)
    else:
        left, right = left[0], right[0]
    arrays = {"lora_a": mx.array(left), "lora_b": mx.array(right)}
    return Module(arrays, 1.0)


def _unweighted(pair: tuple[Array, Array], expert: int, weight: float) -> Array:
    change: Array = pair[0][expert] @ (pair[1][expert] / np.float32(weight))
    return change


def _cut(left: Array, right: Array, rank: int) -> tuple[Array, Array, float, float]:
    """The nearest product of a lower rank, by the singular values of a small matrix: left = QR, rightᵀ = PS, R Sᵀ."""
    q, r = np.linalg.qr(left.astype(np.float64))
    p, s = np.linalg.qr(right.T.astype(np.float64))
    u, values, v = np.linalg.svd(r @ s.T)
    values = np.where(values > NOTHING * np.linalg.norm(r) * np.linalg.norm(s), values, 0.0)
    root = np.sqrt(values[:rank])
    a = (q @ u[:, :rank] * root).astype(np.float32)
    b = ((p @ v[:rank].T * root).T).astype(np.float32)
    squares = values**2
    return a, b, float(squares[rank:].sum()), float(squares.sum())


def _largest(change: Array, rank: int, generator: np.random.Generator) -> tuple[Array, Array, float, float]:
    """The nearest product of this rank to a whole matrix, by subspace iteration (https://arxiv.org/abs/0909.4061)."""
    whole = float(np.square(change, dtype=np.float64).sum())
    width = min(rank + EXTRA, *change.shape)
    basis = np.linalg.qr(change @ generator.standard_normal((change.shape[1], width)).astype(np.float32))[0]
    for _ in range(ROUNDS):
        basis = np.linalg.qr(change @ np.linalg.qr(change.T @ basis)[0])[0]
    u, values, v = np.linalg.svd(basis.T @ change, full_matrices=False)
    root = np.sqrt(values[:rank])
    a = ((basis @ u[:, :rank]) * root).astype(np.float32)
    b = (v[:rank] * root[:, None]).astype(np.float32)
    return a, b, whole - float(np.square(values[:rank], dtype=np.float64).sum()), whole


def _ties(changes: Sequence[Array], weights: Sequence[float], density: float, generator: np.random.Generator) -> Array:
    """Trim each change to its largest entries, elect the sign with more weight, average what agrees with it."""
    del generator
    trimmed: Array = np.stack(
        [weight * _trim(change, density) for change, weight in zip(changes, weights, strict=True)]
    )
    sign = np.where(trimmed.sum(axis=0) >= 0, 1, -1)
    agreeing = np.sign(trimmed) == sign
    total = (trimmed * agreeing).sum(axis=0)
    mean: Array = (total / np.maximum(agreeing.sum(axis=0), 1)).astype(np.float32)
    return mean


def _trim(change: Array, density: float) -> Array:
    keep = int(density * change.size)
    if keep >= change.size:
        return change
    if keep == 0:
        return np.zeros_like(change)
    edge = np.partition(np.abs(change), change.size - keep, axis=None)[change.size - keep]
    kept: Array = np.where(np.abs(change) >= edge, change, np.float32(0))
    return kept


def _dare(changes: Sequence[Array], weights: Sequence[float], density: float, generator: np.random.Generator) -> Array:
    """Drop entries of each change at random, scale up the rest, and add."""
    total = np.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        keep = generator.random(change.shape) < density
        total += np.where(keep, change * np.float32(weight / density), np.float32(0))
    return total
