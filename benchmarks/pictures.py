"""Memory of a step against the length of a sample and against the vocabulary, as PNG."""

from __future__ import annotations

from pathlib import Path

from benchmarks.arena import compete
from benchmarks.scenarios import INPUTS, PRODUCTS, STEP, Scenario

LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)
VOCABULARIES = (8_192, 32_000, 65_536, 151_936, 262_144)
LARGEST_PLAIN = 8192  # above, the incumbent's T × T arrays outgrow a small machine


def draw(folder: Path) -> None:
    """Measure and draw both pictures."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    by_length = _sweep([_long(length) for length in LENGTHS], list(LENGTHS))
    by_vocabulary = _sweep([_wide(size) for size in VOCABULARIES], list(VOCABULARIES))
    _plot(folder / "memory_by_length.png", "tokens of one sample", 1024, by_length)
    _plot(folder / "memory_by_vocabulary.png", "vocabulary", 1000, by_vocabulary)


def _plot(path: Path, label: str, thousand: int, found: dict[str, list[tuple[int, float]]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for contestant, points in found.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=contestant.replace("`", ""))
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="peak above the weights, MB")
    axes.set_xticks(sorted({point for points in found.values() for point, _ in points}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / thousand:.0f}k")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _sweep(scenarios: list[Scenario], points: list[int]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for scenario, point in zip(scenarios, points, strict=True):
        for result in compete(scenario, 1):
            print(f"{scenario.title}: {result.name} {result.memory / 1e6:,.0f} MB {result.failure}", flush=True)
            if not result.failure:
                found.setdefault(result.name, []).append((point, result.memory / 1e6))
    return found


def _long(length: int) -> Scenario:
    entrants = (STEP, PRODUCTS, INPUTS) if length <= LARGEST_PLAIN else (PRODUCTS, INPUTS)
    title = f"{length:,} tokens"
    return Scenario("length", title, (length,), hidden=64, layers=2, vocabulary=1024, entrants=entrants)


def _wide(size: int) -> Scenario:
    entrants, title = (STEP, PRODUCTS, INPUTS), f"vocabulary {size:,}"
    return Scenario("vocabulary", title, (128,) * 2, hidden=64, layers=2, vocabulary=size, entrants=entrants)
