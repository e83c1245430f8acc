"""PEFT's adapter_config.json: what it says about one module, and what in it we cannot do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mlxlora.errors import FormatError, Problem, UnsupportedError

_NOTHING: Callable[[Any], bool] = lambda value: not value  # noqa: E731
_INIT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_SAVE_AS_LORA = "Save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
_FUSE = "Merge it with PEFT (merge_and_unload) and convert the merged model"

# field: (whether its value changes nothing for us, why another value is refused, what to do)
REFUSED: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "bias": (lambda value: value in (None, "none"), "the biases of the base were trained, too", _FUSE),
    "lora_bias": (_NOTHING, "B has a bias, which no adapter layer here has", _FUSE),
    "init_lora_weights": (
        lambda value: not str(value).lower().startswith(_INIT_CHANGES_BASE),
        "PEFT changes the base's weights before it applies this adapter",
        _SAVE_AS_LORA,
    ),
    "layer_replication": (_NOTHING, "the base's layers are repeated", _FUSE),
    "use_qalora": (_NOTHING, "inputs are pooled before A", "Merge it with PEFT first"),
    "alora_invocation_tokens": (_NOTHING, "it acts only after an invocation sequence", "Train a plain LoRA instead"),
    "trainable_token_indices": (_NOTHING, "single rows of the embedding were trained", _FUSE),
    "use_bdlora": (_NOTHING, "A and B are block-diagonal in a layout of their own", "Merge it with PEFT first"),
    "arrow_config": (_NOTHING, "it routes between several adapters", "Export each of them alone"),
    "kasa_config": (_NOTHING, "it changes the base's weights", _FUSE),
    "monteclora_config": (_NOTHING, "it samples its weights", _FUSE),
}


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A checked adapter_config.json. Module paths are transformers' own."""

    raw: dict[str, Any]

    @classmethod
    def read(cls, raw: Any) -> PeftConfig:
        """Check a parsed file. Raises FormatError for wrong values, UnsupportedError for what we cannot do."""
        if not isinstance(raw, dict) or "peft_type" not in raw:
            raise FormatError("adapter_config.json is no PEFT configuration: it has no peft_type.")
        if raw["peft_type"] != "LORA":
            raise UnsupportedError(f"PEFT's {raw['peft_type']} adapters are not LoRA: only LORA can be read. {_FUSE}.")
        wrong = [*_number_problems(raw), *_type_problems(raw)]
        if wrong:
            raise FormatError.of("adapter_config.json holds impossible values:", wrong)
        refused = [
            f"  {name} = {raw[name]!r}: {why}. {advice}."
            for name, (harmless, why, advice) in REFUSED.items()
            if name in raw and not harmless(raw[name])
        ]
        if refused:
            raise UnsupportedError("\n".join(["This PEFT adapter does what cannot be carried over:", *refused]))
        return cls(raw)

    @property
    def dora(self) -> bool:
        return bool(self.raw.get("use_dora"))

    @property
    def dropout(self) -> float:
        return float(self.raw.get("lora_dropout") or 0.0)

    @property
    def saved_modules(self) -> list[str]:
        """`modules_to_save`: modules that were trained whole."""
        return list(self.raw.get("modules_to_save") or [])

    @property
    def parameters(self) -> list[str]:
        """`target_parameters`: bare parameters that carry LoRA."""
        return list(self.raw.get("target_parameters") or [])

    def rank(self, path: str) -> int:
        """The rank that the module (or parameter) at `path` has by the configuration."""
        return int(self._by_pattern("rank_pattern", path, self.raw.get("r", 8)))

    def scale(self, path: str) -> float:
        """What B·A is multiplied with at `path`: alpha / r, or alpha / √r with rsLoRA."""
        alpha = float(self._by_pattern("alpha_pattern", path, self.raw.get("lora_alpha", 8)))
        rank = self.rank(path)
        return alpha / (math.sqrt(rank) if self.raw.get("use_rslora") else rank)

    def _by_pattern(self, field: str, path: str, default: Any) -> Any:
        for pattern, value in (self.raw.get(field) or {}).items():
            if safe_pattern(pattern, field).match(path):
                return value
        return default

    def expected(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` that the configuration says carry LoRA; none when it says so by a regular expression."""
        targets = self.raw.get("target_modules")
        if not isinstance(targets, list):
            return []
        without = self.raw.get("exclude_modules") or []
        excluded = without if isinstance(without, list) else []
        if without and not excluded:
            return []
        return [
            path
            for path in paths
            if _named(path, targets)
            and not _named(path, excluded)
            and not any(_named(path, [saved]) for saved in self.saved_modules)
            and self._layer_chosen(path, targets)
        ]

    def _layer_chosen(self, path: str, targets: list[str]) -> bool:
        layers = self.raw.get("layers_to_transform")
        if layers is None or layers == [] or path in targets:
            return True
        found = re.search(r"\.(\d+)\.", path)  # the first number in a path is its layer's
        wanted = layers if isinstance(layers, list) else [layers]
        return found is not None and int(found[1]) in wanted


def _named(path: str, names: list[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def safe_pattern(pattern: str, field: str) -> re.Pattern[str]:
    """PEFT's matching of a pattern: a regular expression for the end of a module path that starts after a dot.

    The file comes from others, so expressions that can take forever are refused.
    """
    if len(pattern) > 300 or re.search(r"\)[*+{?]", pattern) or len(re.findall(r"[*+{]", pattern)) > 2:
        raise UnsupportedError(f"{field} '{pattern[:80]}' is too complex an expression; write module names instead.")
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except re.error as error:
        raise FormatError(f"{field} '{pattern[:80]}' is no regular expression: {error}.") from None


def _number_problems(raw: dict[str, Any]) -> list[Problem]:
    ranks = {"r": raw.get("r", 8), **_entries(raw, "rank_pattern")}
    alphas = {"lora_alpha": raw.get("lora_alpha", 8), **_entries(raw, "alpha_pattern")}
    problems = [
        Problem(name, f"must be a whole number from 1 to 65536, not {rank!r}")
        for name, rank in ranks.items()
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 65536
    ]
    problems += [
        Problem(name, f"must be a number of at most 1e6, not {alpha!r}")
        for name, alpha in alphas.items()
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= 1e6
    ]
    dropout = raw.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(Problem("lora_dropout", f"must be at least 0 and below 1, not {dropout!r}"))
    return problems


def _entries(raw: dict[str, Any], field: str) -> dict[str, Any]:
    patterns = raw.get(field) or {}
    return {f"{field}[{key!r}]": value for key, value in patterns.items()} if isinstance(patterns, dict) else {}


def _type_problems(raw: dict[str, Any]) -> list[Problem]:
    kinds: dict[str, tuple[type, ...]] = {
        "rank_pattern": (dict,), "alpha_pattern": (dict,), "modules_to_save": (list,), "target_parameters": (list,),
        "target_modules": (list, str), "exclude_modules": (list, str), "layers_to_transform": (list, int),
        "use_dora": (bool,), "use_rslora": (bool,), "fan_in_fan_out": (bool,),
    }  # fmt: skip
    problems = []
    for name, allowed in kinds.items():
        value = raw.get(name)
        if value is not None and not isinstance(value, allowed):
            words = " or ".join(kind.__name__ for kind in allowed)
            problems.append(Problem(name, f"must be a {words}, not {value!r:.80}"))
        texts = ("modules_to_save", "target_parameters", "target_modules", "exclude_modules")
        if name in texts and isinstance(value, list) and not all(isinstance(item, str) for item in value):
            problems.append(Problem(name, "must list names"))
    return problems
