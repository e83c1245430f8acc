"""What to adapt and how strongly: the settings, and what they come to for one module."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from mlxlora.errors import ConfigError, Problem

Kind = Literal["lora", "dora", "full"]
PRESETS = ("attention", "attention+mlp", "all-linear", "output", "all")
MAX_RANK = 65_536  # wider than any layer known
MAX_SCALE = 1e4  # a larger |scale| is a damaged file or a mistake, never a setting


def matches(pattern: str, path: str) -> bool:
    """Whether a name pattern means the module at `path`.

    A pattern is compared with the whole path and with every tail of it that starts after a dot, so `q_proj`,
    `self_attn.q_proj`, `model.layers.3.*` and `*_proj` all say what they seem to. `*`, `?` and `[…]` as in file names.
    """
    if fnmatchcase(path, pattern):
        return True
    return any(fnmatchcase(path[i + 1 :], pattern) for i, letter in enumerate(path) if letter == ".")


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """The settings of one adapted module.

    rank:    columns of A, rows of B
    scale:   what the product of A and B is multiplied with: alpha / rank, or alpha / √rank (rsLoRA)
    dropout: probability with which an input of A is zeroed while training
    """

    rank: int
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True)
class AdapterConfig:
    """Which modules learn, and how."""

    type: Kind = "lora"
    """lora; dora (LoRA and a learned magnitude a row); or full: every chosen weight itself learns, kept in float32,
    while the forward pass stays in the model's own dtype"""
    rank: int = 16
    """rank of the two factors"""
    alpha: float = 32.0
    """strength: the product of the factors is scaled by alpha / rank"""
    dropout: float = 0.0
    """probability with which an input of the adapter is zeroed while training"""
    targets: list[str] = field(default_factory=list)
    """what learns: attention, attention+mlp, all-linear (every linear layer and expert in the blocks, without the
    router of a mixture of experts), output, or patterns of module names such as q_proj or 'mlp.*'; when left out,
    all-linear; with full, all"""
    layers: Literal["all"] | int | list[int] = "all"
    """blocks that learn: all, the number of last ones, or a list counted from 0; the output layer is in no block"""
    rslora: bool = False
    """scale by alpha / √rank, which keeps large ranks stable"""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """another rank for modules whose name matches; the first pattern that matches counts"""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """another alpha for modules whose name matches; the first pattern that matches counts"""

    def __post_init__(self) -> None:
        if not self.targets:
            object.__setattr__(self, "targets", ["all"] if self.type == "full" else ["all-linear"])
        if problems := [*self._value_problems(), *self._contradictions()]:
            raise ConfigError.of("The adapter cannot be made like this:", problems)

    def layer(self, path: str) -> LayerConfig:
        """The settings of the module at `path`."""
        rank = next((r for pattern, r in self.rank_pattern.items() if matches(pattern, path)), self.rank)
        alpha = next((a for pattern, a in self.alpha_pattern.items() if matches(pattern, path)), self.alpha)
        return LayerConfig(rank, alpha / (math.sqrt(rank) if self.rslora else rank), self.dropout)

    def _value_problems(self) -> list[Problem]:
        problems = []
        if self.type not in get_args(Kind):
            problems.append(Problem("type", f"must be one of {', '.join(get_args(Kind))}, not {self.type!r}"))
        for name, rank in [("rank", self.rank), *((f"rank_pattern[{p!r}]", r) for p, r in self.rank_pattern.items())]:
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
                problems.append(Problem(name, f"must be a whole number from 1 to {MAX_RANK:,}, not {rank!r}"))
        alphas = [("alpha", self.alpha), *((f"alpha_pattern[{p!r}]", a) for p, a in self.alpha_pattern.items())]
        for name, alpha in alphas:
            if not (math.isfinite(alpha) and 0 < alpha <= MAX_SCALE):
                problems.append(Problem(name, f"must lie above 0 and not above {MAX_SCALE:g}, not {alpha!r}"))
        if not 0 <= self.dropout < 1:
            problems.append(Problem("dropout", f"must be at least 0 and below 1, not {self.dropout!r}"))
        if any(not target.strip() for target in self.targets):
            problems.append(Problem("targets", "holds an empty name"))
        layers: Any = self.layers
        if isinstance(layers, str) and layers != "all":
            problems.append(Problem("layers", f"must be 'all', a number or a list of numbers, not {layers!r}"))
        if isinstance(layers, bool) or (isinstance(layers, int) and layers < 1):
            problems.append(Problem("layers", f"must be at least 1, not {layers!r}"))
        if isinstance(layers, list) and (not layers or len(set(layers)) < len(layers) or min(layers) < 0):
            problems.append(Problem("layers", f"must list different block numbers from 0 on, not {layers!r}"))
        return problems

    def _contradictions(self) -> list[Problem]:
        problems = []
        if self.type == "full":
            given: dict[str, object] = {"dropout": self.dropout, "rslora": self.rslora}
            given |= {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
            for name in [name for name, value in given.items() if value]:
                problems.append(Problem(name, "means nothing with type full", "Leave it out, or use lora or dora."))
        elif "all" in self.targets:
            advice = "Use all-linear, or type full."
            problems.append(Problem("targets", f"'all' includes weights that cannot carry {self.type}", advice))
        return problems
