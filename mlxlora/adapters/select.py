"""Which modules of a network are meant: by preset or by name, and in which blocks.

The blocks are what the network itself calls its `layers` (every model of mlx-lm does). A preset looks inside blocks by
what the modules are called there and by the names of their classes; `output` looks outside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from mlxlora.adapters import heads, weights
from mlxlora.adapters.config import PRESETS, AdapterConfig, matches
from mlxlora.adapters.kinds import can_carry
from mlxlora.errors import ConfigError, Problem, UnsupportedError

ATTENTION = re.compile(r"att(n|ention)|(^|[._])att_", re.IGNORECASE)
FEED_FORWARD = re.compile(
    r"mlp|moe|ffn|feed_?forward|expert|(^|[._])ff(_|$|\.)|dense_h_to_4h|dense_4h_to_h", re.IGNORECASE
)
MIXER = re.compile(r"mamba|ssm|recurrent", re.IGNORECASE)  # inside of models that are called "…Moe…" altogether
ROUTER = re.compile(r"(^|_)gate$|router", re.IGNORECASE)
OVERWRITTEN = re.compile(r"(^|\.)altup\.")  # layers whose weights the model itself assigns in every forward pass


@dataclass(frozen=True, slots=True)
class Found:
    """One module of a network.

    path:   from the network
    module: the module
    block:  number of the block that it stands in, None outside
    inner:  path from the block (the whole path outside)
    names:  the names and class names on the way from the block to the module: what presets look at
    """

    path: str
    module: nn.Module
    block: int | None
    inner: str
    names: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen modules by path, and what a preset meant but had to leave out: path and reason."""

    chosen: dict[str, nn.Module]
    left_out: dict[str, str] = field(default_factory=dict)


def block_paths(network: nn.Module) -> list[str]:
    """The paths of the network's blocks, first to last.

    Raises UnsupportedError where the network does not say which blocks it is made of.
    """
    blocks: list[nn.Module] | None = getattr(network, "layers", None)
    if not isinstance(blocks, (list, tuple)) or not blocks:
        raise UnsupportedError(f"{type(network).__module__} does not say which blocks it is made of (`.layers`).")
    paths = {id(module): path for path, module in network.named_modules()}
    return [paths[id(block)] for block in blocks if block is not None]


def survey(network: nn.Module, *, whole: bool = True) -> list[Found]:
    """Every module of the network with its place, ordered by path.

    whole: MLA's `kv_b_proj` as one module (see `heads.py`), instead of the two that the network has
    """
    blocks = {path: number for number, path in enumerate(block_paths(network))}
    modules: dict[str, nn.Module] = dict(network.named_modules())
    joined = heads.find(modules) if whole else {}
    halves = {f"{path.removesuffix(weights.JOINED)}{name}" for path, split in joined.items() for name in split.halves}
    modules = {path: module for path, module in modules.items() if path not in halves} | joined
    found = []
    for path, module in sorted(modules.items()):
        tails = [path[:i] for i, letter in enumerate(path) if letter == "."] + [path]
        home = next((tail for tail in tails if tail in blocks), None)
        inner = path[len(home) + 1 :] if home is not None else path
        prefix = f"{home}." if home is not None else ""
        way = [prefix + inner[:i] for i, letter in enumerate(inner) if letter == "."]
        classes = [type(modules[step]).__name__ for step in way if step in modules]
        found.append(Found(path, module, None if home is None else blocks[home], inner, ".".join([inner, *classes])))
    return found


def select(network: nn.Module, config: AdapterConfig) -> Selection:
    """The modules that `config` means.

    Raises ConfigError, with all problems at once, for a target, rank or alpha pattern that means nothing here (naming
    the nearest modules), and for a block number that the network does not have.
    """
    modules = survey(network, whole=config.type != "full")  # the weights themselves are those of the halves
    wanted_blocks = _blocks(config, 1 + max((f.block for f in modules if f.block is not None), default=-1))
    problems: list[Problem] = []
    chosen: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    for target in config.targets:
        preset = target in PRESETS
        meant = _preset(target, modules, network) if preset else [f for f in modules if matches(target, f.path)]
        usable = [f for f in meant if can_carry(f.module, config.type)]
        inside = [f for f in usable if f.block is None or f.block in wanted_blocks]
        if not inside:
            problems.append(_nothing(target, meant, usable, modules, config))
        chosen |= {f.path: f.module for f in inside}
        if preset:
            others = [f for f in meant if not can_carry(f.module, config.type) and _is_weight(f.module)]
            left_out |= {f.path: f"{type(f.module).__name__} cannot carry {config.type}" for f in others}
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name):
            if chosen and not any(matches(pattern, path) for path in chosen):
                near = _near(pattern, list(chosen))
                problems.append(Problem(f"{name}[{pattern!r}]", f"matches none of the adapted modules.{near}"))
    if problems:
        raise ConfigError.of("The adapter does not fit this model:", problems)
    return Selection(dict(sorted(chosen.items())), left_out)


def _is_weight(module: nn.Module) -> bool:
    """A module that multiplies with a matrix of its own."""
    if weights.is_heads(module):
        return True
    weight = module.get("weight")
    return weight is not None and weight.ndim >= 2 and not isinstance(module, (nn.Conv1d, nn.Conv2d))


def _blocks(config: AdapterConfig, count: int) -> set[int]:
    if config.layers == "all":
        return set(range(count))
    if isinstance(config.layers, int):
        if config.layers > count:
            raise ConfigError(f"layers: the last {config.layers} blocks were asked for; this model has {count}.")
        return set(range(count - config.layers, count))
    assert isinstance(config.layers, list)
    if beyond := [number for number in config.layers if number >= count]:
        raise ConfigError(f"layers: {beyond} were asked for; this model has blocks 0 to {count - 1}.")
    return set(config.layers)


def _preset(name: str, modules: list[Found], network: nn.Module) -> list[Found]:
    if name == "all":
        return modules
    if name == "output":
        return [output_module(network, modules)]
    expert_counts: dict[int, set[int]] = {}
    for f in modules:
        if f.block is not None and weights.is_experts(f.module):
            expert_counts.setdefault(f.block, set()).add(weights.shape(f.module)[0])
    inside = [
        f
        for f in modules
        if f.block is not None
        and _is_weight(f.module)
        and not weights.is_embedding(f.module)
        and not OVERWRITTEN.search(f.inner)
        and not is_router(f, expert_counts.get(f.block, set()))
    ]
    if name == "all-linear":
        return inside
    attention = [f for f in inside if ATTENTION.search(f.names)]
    if name == "attention":
        return attention
    feed_forward = [f for f in inside if FEED_FORWARD.search(f.names) and not MIXER.search(f.names)]
    return [*attention, *(f for f in feed_forward if f not in attention)]


def is_router(f: Found, expert_counts: set[int]) -> bool:
    """Whether a linear layer only decides which experts see a token (or how much the shared expert counts).

    Recognised in blocks that hold experts, outside of attention, by its name and by its width: one score an expert.
    """
    if not expert_counts or ATTENTION.search(f.names) or weights.is_experts(f.module):
        return False
    parts = f.inner.split(".")
    if any("router" in part.lower() for part in parts):
        return True
    rows = weights.shape(f.module)[-2]
    return any(ROUTER.search(part) for part in parts) and rows in {1, *expert_counts}


def output_module(network: nn.Module, modules: list[Found] | None = None) -> Found:
    """The final projection onto the vocabulary: the head, or the embeddings where the head is tied to them."""
    outside = [f for f in (modules or survey(network)) if f.block is None]
    tables = [f for f in outside if weights.is_embedding(f.module)]
    rows = {weights.shape(f.module)[0] for f in tables}
    heads = [f for f in outside if weights.is_linear(f.module) and weights.shape(f.module)[0] in rows]
    if heads:
        return min(heads, key=lambda f: f.path.count("."))
    if not tables:
        raise UnsupportedError(f"{type(network).__module__}: neither a head nor a table of embeddings was found.")
    arguments: Any = getattr(network, "args", None)
    vocabulary = getattr(arguments, "vocab_size", None)
    fitting = [f for f in tables if weights.shape(f.module)[0] == vocabulary] or tables
    return max(fitting, key=lambda f: (weights.shape(f.module)[0], -len(f.path)))


def _nothing(
    target: str, meant: list[Found], usable: list[Found], modules: list[Found], config: AdapterConfig
) -> Problem:
    where = f"targets: {target!r}"
    if usable:
        return Problem(where, f"matches {len(usable)} modules, but none in layers {config.layers!r}")
    if meant and config.type == "full" and any("scales" in f.module for f in meant):
        advice = "Use lora or dora, or unpack it first: mlxlora convert --dequantize."
        return Problem(where, f"matches only quantized weights ({meant[0].path}, …), which cannot be trained", advice)
    if meant:
        kinds = sorted({type(f.module).__name__ for f in meant})
        return Problem(where, f"matches {meant[0].path} ({', '.join(kinds)}), which cannot carry {config.type}")
    if other := _other_half(target, modules, config):
        return Problem(where, *other)
    names = [f.path for f in modules if can_carry(f.module, config.type)]
    return Problem(where, f"matches no module of this model.{_near(target, names)}")


def _other_half(target: str, modules: list[Found], config: AdapterConfig) -> tuple[str, str] | None:
    """What to say to one who means MLA's `kv_b_proj`, or its halves, where they are not what learns."""
    joined, halves = weights.JOINED, (weights.KEYS, weights.VALUES)
    if config.type == "full":
        known = any(weights.is_half(f.module) for f in modules)
        meant = matches(target, f"self_attn.{joined}")
        return (
            (f"{joined} is {' and '.join(halves)} here", f"Name {' and '.join(halves)}.") if known and meant else None
        )
    known = any(weights.is_heads(f.module) for f in modules)
    if not known or not any(matches(target, f"self_attn.{half}") for half in halves):
        return None
    return f"is a half of {joined}, which carries one adapter for both", f"Name {joined}."


def _near(pattern: str, paths: list[str]) -> str:
    """The names nearest to a pattern, for the end of a message."""
    from difflib import get_close_matches

    tails: dict[str, None] = {}
    for path in paths:
        words = path.split(".")
        tails |= dict.fromkeys(".".join(words[i:]) for i in range(len(words)))
    close = get_close_matches(pattern, list(tails), n=3, cutoff=0.5)
    if close:
        return f" Nearest: {', '.join(close)}."
    leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
    return f" There are: {', '.join(leaves[:12])}{', …' if len(leaves) > 12 else ''}."
