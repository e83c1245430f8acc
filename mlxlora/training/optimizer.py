"""The optimizer and its schedule: MLX's own optimizers behind one pure update.

`Optimizer.update` is one compiled function: divide by the count of the step, clip, apply, and leave everything as it
was where the loss or the gradient is not finite. The learning rate is a function of the step alone, so resuming needs
nothing but the step number and the moments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.optimizers
from mlx.utils import tree_map, tree_map_with_path

from mlxlora.errors import ConfigError
from mlxlora.parameters import Flat, flat

Tree = Any

# which of the optional settings an optimizer has, and what they are where nothing is said
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8},
    "sgd": {"momentum": 0.0, "weight_decay": 0.0},
    "adafactor": {"eps": 1e-30, "weight_decay": 0.0},
    "lion": {"betas": (0.9, 0.99), "weight_decay": 0.0},
    "muon": {"momentum": 0.95, "weight_decay": 0.01},
}


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rate over time, and clipping."""

    name: Literal["adamw", "adam", "sgd", "adafactor", "lion", "muon"] = "adamw"
    """the rule of the updates; adam and adamw as in the papers, with bias correction"""
    learning_rate: float = 2e-4
    """the highest learning rate, reached after the warm-up"""
    betas: tuple[float, float] | None = None
    """decay of the moments; default 0.9 and 0.999 for adam and adamw, 0.9 and 0.99 for lion"""
    eps: float | None = None
    """default 1e-8 for adam and adamw, 1e-30 (on the squared gradient) for adafactor"""
    momentum: float | None = None
    """default 0 for sgd, 0.95 for muon"""
    weight_decay: float | None = None
    """decoupled; default 0.01 for adamw and muon, else 0"""
    decay_min_dims: int = 2
    """parameters with fewer dimensions than this are not decayed"""
    lora_plus_ratio: float = 1.0
    """LoRA+: the learning rate of every lora_b is this many times that of the rest (Hayou et al. 2024 suggest 16)"""
    schedule: Literal["constant", "linear", "cosine", "cosine-restarts", "range-test"] = "cosine"
    """how the learning rate falls after the warm-up; range-test instead lets it grow by equal factors, from
    min_learning_rate to learning_rate"""
    warmup_ratio: float | None = None
    """warm-up as a share of all steps; default 0.03 unless warmup_steps is given"""
    warmup_steps: int | None = None
    """warm-up in steps"""
    min_learning_rate: float = 0.0
    """where linear, cosine and each of its restarts end, and range-test begins"""
    cycles: int = 3
    """cosine-restarts: how many times the cosine is run through"""
    cycle_growth: float = 1.0
    """cosine-restarts: each cycle is this many times as long as the one before"""
    max_grad_norm: float | None = 1.0
    """the gradient's global norm is clipped to this; null for no clipping"""

    def __post_init__(self) -> None:
        def demand(good: bool, field: str, rule: str) -> None:
            if not good:
                raise ConfigError(f"optimizer.{field} is {getattr(self, field)!r}, but must be {rule}.")

        demand(
            math.isfinite(self.learning_rate) and 0 < self.learning_rate <= 10, "learning_rate", "above 0, at most 10"
        )
        demand(0 <= self.min_learning_rate <= self.learning_rate, "min_learning_rate", "from 0 to learning_rate")
        demand(
            self.schedule != "range-test" or self.min_learning_rate > 0, "min_learning_rate", "above 0 for range-test"
        )
        demand(self.betas is None or all(0 <= b < 1 for b in self.betas), "betas", "from 0 to below 1")
        demand(self.eps is None or 0 < self.eps < 1, "eps", "between 0 and 1")
        demand(self.momentum is None or 0 <= self.momentum < 1, "momentum", "from 0 to below 1")
        demand(self.weight_decay is None or 0 <= self.weight_decay < 1, "weight_decay", "from 0 to below 1")
        demand(self.decay_min_dims >= 0, "decay_min_dims", "0 or more")
        demand(0 < self.lora_plus_ratio <= 1000, "lora_plus_ratio", "above 0, at most 1000")
        demand(self.warmup_ratio is None or 0 <= self.warmup_ratio < 1, "warmup_ratio", "from 0 to below 1")
        demand(self.warmup_steps is None or self.warmup_steps >= 0, "warmup_steps", "0 or more")
        demand(self.cycles >= 1, "cycles", "1 or more")
        demand(0 < self.cycle_growth <= 100, "cycle_growth", "above 0, at most 100")
        demand(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", "above 0, or null")
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ConfigError(
                "optimizer.warmup_ratio and optimizer.warmup_steps say the same thing twice. Give one of them."
            )
        for field in ("cycles", "cycle_growth"):
            if self.schedule != "cosine-restarts" and getattr(self, field) != getattr(type(self), field):
                raise ConfigError(
                    f"optimizer.{field} is given, but the schedule is {self.schedule}, not cosine-restarts."
                )
        if self.schedule == "constant" and self.min_learning_rate:
            raise ConfigError("optimizer.min_learning_rate is given, but the schedule is constant: it never falls.")
        known = SETTINGS[self.name]
        for field in ("betas", "eps", "momentum", "weight_decay"):
            if getattr(self, field) is not None and field not in known:
                raise ConfigError(f"optimizer.{field} is given, but {self.name} has no such setting.")

    def setting(self, field: str) -> Any:
        """A setting, or the optimizer's own default for it."""
        given = getattr(self, field)
        return SETTINGS[self.name][field] if given is None else given


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of update number `step` (from 0) out of `steps`."""
    if config.warmup_steps is not None:
        warmup = config.warmup_steps
    else:
        warmup = math.ceil((0.03 if config.warmup_ratio is None else config.warmup_ratio) * steps)
    top, floor = config.learning_rate, config.min_learning_rate
    if step < warmup:
        return top * (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    match config.schedule:
        case "constant":
            return top
        case "linear":
            return floor + (top - floor) * (1 - progress)
        case "cosine":
            return floor + (top - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case "range-test":
            return float(floor * (top / floor) ** ((step - warmup) / max(steps - warmup - 1, 1)))
        case "cosine-restarts":
            lengths = [config.cycle_growth**cycle for cycle in range(config.cycles)]
            position = progress * sum(lengths)
            for length in lengths[:-1]:
                if position < length:
                    break
                position -= length
            else:
                length = lengths[-1]
            return floor + (top - floor) * 0.5 * (1 + math.cos(math.pi * min(position / length, 1.0)))


class Optimizer:
    """One of MLX's optimizers over a flat dictionary of parameters.

    Example:
        >>> optimizer = Optimizer(OptimizerConfig(), steps=100)
        >>> optimizer.init(parameters)
        >>> parameters, norm, finite = optimizer.update(parameters, gradients, loss, count, step=0)
    """

    def __init__(self, config: OptimizerConfig, steps: int) -> None:
        self.config = config
        self.steps = steps
        self.state: Tree = None
        # no method is compiled: with its object in it, it would keep the moments until Python looks for cycles
        self._update = mx.compile(lambda *given: _updated(config, *given))

    def init(self, parameters: Flat) -> None:
        """Fresh moments for `parameters`."""
        fresh = build(self.config)
        fresh.init(parameters)
        self.state = fresh.state
        mx.eval(self.state)

    def learning_rate(self, step: int) -> float:
        """The learning rate of update number `step`, from 0."""
        return learning_rate(self.config, step, self.steps)

    def update(
        self, parameters: Flat, gradients: Flat, loss: mx.array, count: mx.array, step: int
    ) -> tuple[Flat, mx.array, mx.array]:
        """One update from summed gradients, the summed loss and the weight that both are to be divided by.

        Returns the new parameters, the norm of the mean gradient before clipping, and whether all of it
        was finite. Where it was not, parameters and moments are what they were.
        """
        rate = mx.array(self.learning_rate(step), mx.float32)
        new, self.state, norm, finite = self._update(parameters, gradients, self.state, loss, count, rate)
        return new, norm, finite

    def flat_state(self) -> Flat:
        """The moments and counters, by name, for a checkpoint."""
        return flat(self.state)

    def restore(self, saved: Flat) -> None:
        """Put the moments and counters of a checkpoint back. Raises ConfigError where names, shapes or types differ."""
        own = self.flat_state()
        wrong = sorted(set(own) ^ set(saved)) or [
            name for name in own if (own[name].shape, own[name].dtype) != (saved[name].shape, saved[name].dtype)
        ]
        if wrong:
            raise ConfigError(f"the optimizer's saved state does not fit: {', '.join(wrong[:5])}.")
        self.state = tree_map_with_path(lambda path, _: saved[path], self.state)


def _updated(
    config: OptimizerConfig,
    parameters: Flat,
    gradients: Flat,
    state: Tree,
    loss: mx.array,
    count: mx.array,
    rate: mx.array,
) -> tuple[Flat, Tree, mx.array, mx.array]:
    """What `Optimizer.update` computes, as a function of its arguments alone."""
    mean = {name: gradient.astype(mx.float32) / count for name, gradient in gradients.items()}
    norm = mx.sqrt(sum((mx.square(gradient).sum() for gradient in mean.values()), mx.array(0.0)))
    finite = mx.logical_and(mx.isfinite(norm), mx.isfinite(loss))
    if config.max_grad_norm is not None:
        factor = mx.minimum(config.max_grad_norm / (norm + 1e-6), 1.0)
        mean = {name: gradient * factor for name, gradient in mean.items()}
    inner = build(config)  # of this trace alone: it would keep what it has seen
    # a copy of every dictionary, since MLX's optimizers write into theirs
    inner.state = {**tree_map(lambda value: value, state), "learning_rate": rate}
    new = inner.apply_gradients(mean, parameters)
    kept = {
        name: mx.where(finite, _finished(config, name, new[name], old, rate), old) for name, old in parameters.items()
    }
    moments = tree_map(lambda fresh, old: mx.where(finite, fresh, old), inner.state, state)
    return kept, moments, norm, finite


def _finished(config: OptimizerConfig, name: str, new: mx.array, old: mx.array, rate: mx.array) -> mx.array:
    """Decoupled weight decay, and LoRA+'s higher rate for lora_b: every update here is linear in the rate."""
    decay = config.setting("weight_decay") if "weight_decay" in SETTINGS[config.name] else 0.0
    if decay and old.ndim >= config.decay_min_dims:
        new = new - rate * decay * old
    if config.lora_plus_ratio != 1.0 and name.endswith("lora_b"):
        new = old + config.lora_plus_ratio * (new - old)
    return new


def build(config: OptimizerConfig) -> Any:
    """MLX's optimizer, without its weight decay: ours is decoupled for every optimizer and knows `decay_min_dims`."""
    rate = config.learning_rate
    match config.name:
        case "adam" | "adamw":
            return mlx.optimizers.Adam(rate, list(config.setting("betas")), config.setting("eps"), bias_correction=True)
        case "sgd":
            return mlx.optimizers.SGD(rate, config.setting("momentum"))
        case "adafactor":
            return mlx.optimizers.Adafactor(
                rate, eps=(config.setting("eps"), 1e-3), scale_parameter=False, relative_step=False
            )
        case "lion":
            return mlx.optimizers.Lion(rate, list(config.setting("betas")))
        case "muon":
            return mlx.optimizers.Muon(rate, config.setting("momentum"), weight_decay=0.0)
