"""What the modules of a model are called in MLX (mlx-lm) and in transformers: one table, read in both directions.

A pattern is a module path with placeholders: `{i}` and `{e}` stand for a number, `{rest}` for the rest of the path.
The inverse of every rule is derived from the rule. An architecture that is not in the table is refused: a guessed name
would make an adapter that the other program loads without a word and applies to nothing.

The table was held against transformers 5.23 and mlx-lm 0.32.2: tests/parity/test_names.py compares every module of
every architecture in it, by name and by shape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from mlxlora.errors import UnsupportedError, nearest

PLACEHOLDER = {"i": r"\d+", "e": r"\d+", "rest": r".+"}


@dataclass(frozen=True, slots=True)
class Rename:
    """Modules at `mlx` are at `hf` in transformers; `older` lists what earlier versions of transformers called them."""

    mlx: str
    hf: str
    older: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a mixture: stacked layers gate_proj, up_proj and down_proj in MLX.

    mlx:         the module that holds them
    hf:          the module in transformers that holds the stacked parameters gate_up_proj and down_proj
    each:        the module of one expert where the version of transformers has such modules
    names:       what its gate, up and down projections are called there
    interleaved: rows of gate and up alternate in gate_up_proj, instead of standing one after the other
    """

    mlx: str
    hf: str
    each: str = ""
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    interleaved: bool = False


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # in MLX, in the order of `Experts.names`


@dataclass(frozen=True, slots=True)
class Family:
    """How the names of one architecture differ.

    renames:    the first rule that fits counts; a module that no rule fits has the same name on both sides
    experts:    where its experts are
    parameters: modules that PEFT must reach by their parameter `weight`: either transformers holds them in a class of
                its own, or PEFT takes their names for those of single experts and rewrites them on loading
    conv1d:     its projections are transformers' Conv1D, whose weight is stored [in, out]
    text:       transformers has no other modules than those that MLX has (no vision tower)
    head:       the output projection in transformers, for models that tie it to the embeddings and in MLX have none
    """

    renames: tuple[Rename, ...] = ()
    experts: tuple[Experts, ...] = ()
    parameters: tuple[str, ...] = ()
    conv1d: bool = False
    text: bool = True
    head: str = "lm_head"


def _inside(mlx: str, hf: str, *older: str) -> tuple[Rename, ...]:
    """A language model inside a larger one, with its head outside of the backbone in transformers."""
    return (
        Rename(f"{mlx}.model.{{rest}}", f"{hf}.{{rest}}", tuple(f"{name}.{{rest}}" for name in older)),
        Rename(f"{mlx}.lm_head", "lm_head", (f"{mlx}.lm_head",)),
    )


def _moe(block: str = "mlp", **changes: Any) -> tuple[Experts, ...]:
    base = f"model.layers.{{i}}.{block}"
    return (Experts(f"{base}.switch_mlp", f"{base}.experts", f"{base}.experts.{{e}}", **changes),)


_PLAIN = Family()
_SAME = (
    "apertus", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "gemma4_text",
    "glm", "glm4", "granite", "helium", "internlm3", "llama", "ministral3", "mistral", "olmo2", "olmo3", "phi",
    "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
_MOE = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "olmoe", "qwen2_moe",
    "qwen3_moe",
)  # fmt: skip
_GATE = ("model.layers.{i}.mlp.gate",)
_DENSE = tuple(f"{{rest}}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
_MIXTRAL_OLD = "model.layers.{i}.block_sparse_moe"
_MIXTRAL_EXPERTS = (
    Experts(
        f"{_MIXTRAL_OLD}.switch_mlp",
        "model.layers.{i}.mlp.experts",
        f"{_MIXTRAL_OLD}.experts.{{e}}",
        ("w1", "w3", "w2"),
    ),
)
_VISION = Family(
    _inside("language_model", "model.language_model", "language_model.model", "model"),
    text=False,
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_SAME, _PLAIN),
    **dict.fromkeys(("gemma3", "gemma4", "mistral3", "qwen2_vl"), _VISION),
    "gpt2": Family((Rename("model.{rest}", "transformer.{rest}"),), conv1d=True),
    "gptj": Family((Rename("model.{rest}", "transformer.{rest}"),)),
    "gpt_neox": Family(
        (
            Rename("model.embed_out", "lm_head", ("embed_out",)),
            Rename("model.h.{i}.{rest}", "gpt_neox.layers.{i}.{rest}"),
            Rename("model.{rest}", "gpt_neox.{rest}"),
        ),
    ),
    "mixtral": Family(
        (Rename(f"{_MIXTRAL_OLD}.gate", _GATE[0], (f"{_MIXTRAL_OLD}.gate",)),),
        _MIXTRAL_EXPERTS,
        _GATE,
    ),
    **dict.fromkeys(_MOE, Family(experts=_moe(), parameters=_GATE + _DENSE)),
    "granitemoe": Family(
        (Rename("model.layers.{i}.block_sparse_moe.router.layer", "model.layers.{i}.block_sparse_moe.router"),),
        (Experts("model.layers.{i}.block_sparse_moe.switch_mlp", "model.layers.{i}.block_sparse_moe.experts"),),
        ("model.layers.{i}.block_sparse_moe.router",),
    ),
    "phimoe": Family(
        (Rename(f"{_MIXTRAL_OLD}.gate", "model.layers.{i}.mlp.router", (f"{_MIXTRAL_OLD}.gate",)),),
        _MIXTRAL_EXPERTS,
        ("model.layers.{i}.mlp.router",),
    ),
    "qwen3_5": Family(_inside("language_model", "model", "model.language_model"), text=False),
    "qwen3_5_moe": Family(
        _inside("language_model", "model", "model.language_model"),
        (
            Experts(
                "language_model.model.layers.{i}.mlp.switch_mlp",
                "model.layers.{i}.mlp.experts",
                "model.layers.{i}.mlp.experts.{e}",
            ),
        ),
        (*_GATE, *_DENSE),
        text=False,
    ),
    "gpt_oss": Family(
        experts=(Experts("model.layers.{i}.mlp.experts", "model.layers.{i}.mlp.experts", interleaved=True),),
        parameters=("model.layers.{i}.mlp.router",),
    ),
}


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """One stacked projection: `holder` is the module in transformers that has the parameters."""

    experts: Experts
    holder: str
    projection: str
    mlx: str


class Names:
    """The names of one architecture, in both directions."""

    def __init__(self, family: Family) -> None:
        self.family = family

    @classmethod
    def of(cls, config: dict[str, Any]) -> Names:
        """The names for a config.json. Raises UnsupportedError for an architecture that is not in the table."""
        kind = str(config.get("model_type"))
        if kind not in FAMILIES:
            raise UnsupportedError(
                f"The module names of '{kind}' in transformers are not known here, so an adapter cannot be carried "
                f"over.{nearest(kind, list(FAMILIES))} Known: {', '.join(sorted(FAMILIES))}. "
                "Fuse the adapter into the model instead."
            )
        return cls(FAMILIES[kind])

    def to_hf(self, path: str) -> str:
        """The path in transformers of an MLX module that is no expert."""
        for rule in self.family.renames:
            if (found := fit(rule.mlx, path)) is not None:
                return rule.hf.format(**found)
        return path

    def to_mlx(self, path: str) -> list[str]:
        """The MLX paths that a module path of any version of transformers may mean, the most likely first."""
        candidates = [
            rule.mlx.format(**found)
            for rule in self.family.renames
            for name in (rule.hf, *rule.older)
            if (found := fit(name, path)) is not None
        ]
        return list(dict.fromkeys([*candidates, path]))

    def is_parameter(self, hf_path: str) -> bool:
        """Whether transformers holds this module's weight as a bare parameter."""
        return any(fit(pattern, hf_path) is not None for pattern in self.family.parameters)

    def expert(self, path: str) -> ExpertPlace | None:
        """The place of an MLX module that is a stacked projection of experts, else None."""
        holder, _, projection = path.rpartition(".")
        for experts in self.family.experts:
            if projection in PROJECTIONS and (found := fit(experts.mlx, holder)) is not None:
                return ExpertPlace(experts, experts.hf.format(**found), projection, path)
        return None

    def expert_holder(self, hf_path: str) -> tuple[Experts, str] | None:
        """For a module of transformers that holds stacked experts: its rule and the MLX module that holds them."""
        for experts in self.family.experts:
            if (found := fit(experts.hf, hf_path)) is not None:
                return experts, experts.mlx.format(**found)
        return None

    def single_expert(self, hf_path: str) -> tuple[str, int] | None:
        """For a projection of one expert (`….experts.3.w1`): the MLX path of the stack, and the expert's number."""
        holder, _, name = hf_path.rpartition(".")
        for experts in self.family.experts:
            if not experts.each or (found := fit(experts.each, holder)) is None:
                continue
            if name in experts.names:
                layer = experts.mlx.format(**found)
                return f"{layer}.{PROJECTIONS[experts.names.index(name)]}", int(found["e"])
        return None


def each_expert(place: ExpertPlace, number: int) -> str:
    """The path of one expert's projection as a module of its own. Raises UnsupportedError where there never was one."""
    experts = place.experts
    found = fit(experts.hf, place.holder)
    if not experts.each or found is None:
        raise UnsupportedError(
            f"{place.mlx}: no version of transformers has a module for each of these experts. "
            "Export with --peft.experts parameters."
        )
    return f"{experts.each.format(**found, e=number)}.{experts.names[PROJECTIONS.index(place.projection)]}"


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)
    text = "".join(
        f"(?P<{part}>{PLACEHOLDER[part]})" if place % 2 else re.escape(part) for place, part in enumerate(parts)
    )
    return re.compile(text)


def fit(pattern: str, path: str) -> dict[str, str] | None:
    """What the placeholders of `pattern` stand for in `path`, or None where it does not fit."""
    match = _compiled(pattern).fullmatch(path)
    return match.groupdict() if match else None
