"""config.json to GGUF's hyper-parameters and back, by the tables in `gguf_architectures`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlxlora.errors import FormatError, ModelError, Problem, UnsupportedError
from mlxlora_convert import gguf_rope
from mlxlora_convert.gguf_architectures import FAMILIES, Family, Field, families_in, family_of
from mlxlora_convert.gguf_header import GGUFHeader
from mlxlora_convert.gguf_tensors import assumed_scalar

Values = dict[str, tuple[str, Any]]  # GGUF's key: (kind, value)
COMMAND_R_PLUS = 64  # blocks of the model that llama.cpp knows to have query and key norms
HEAD_KEYS = ("attention.key_length", "attention.value_length")


def check_family(config: dict[str, Any]) -> Family:
    """The family of a configuration. Raises UnsupportedError for what GGUF or llama.cpp cannot say about it."""
    family = family_of(config)
    if family is None:
        known = ", ".join(one.model_type for one in FAMILIES)
        raise UnsupportedError(
            f"A model of type '{config.get('model_type')}' cannot be written as GGUF yet. Known: {known}."
        )
    problems = [
        Problem(name, f"is {config[name]!r}, only {value!r} can be said", why)
        for name, value, why in family.required
        if name in config and config[name] not in (value, None) and not (value == [] and not config[name])
    ]
    problems += gguf_rope.problems(config, family.scalings)
    problems += layer_problems(config, family)
    if problems:
        raise UnsupportedError("\n  ".join(["This model cannot be said in GGUF:", *map(str, problems)]))
    return family


def layer_problems(config: dict[str, Any], family: Family) -> list[Problem]:
    """What layers of different kinds are not as llama.cpp takes them to be."""
    layers = int(config["num_hidden_layers"])
    kinds = config.get("layer_types") or []
    if family.model_type in ("llama", "mistral", "smollm3") and "sliding_attention" in kinds:
        return [Problem("layer_types", "some layers have a sliding window", "llama.cpp has none in this architecture")]
    found = []
    if family.model_type == "smollm3":
        pattern = config.get("no_rope_layers")
        if pattern is not None and list(pattern) != [int((i + 1) % 4 != 0) for i in range(layers)]:
            found.append(
                Problem("no_rope_layers", str(pattern), "llama.cpp leaves out the rotation in every fourth block")
            )
    if family.model_type == "cohere" and bool(config.get("use_qk_norm")) != (layers >= COMMAND_R_PLUS):
        what = f"is {config.get('use_qk_norm')} in a model of {layers} blocks"
        found.append(Problem("use_qk_norm", what, f"llama.cpp has these norms from {COMMAND_R_PLUS} blocks on"))
    if family.model_type == "gemma3_text" and kinds:
        period = int(config.get("sliding_window_pattern", 6))
        if kinds != ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]:
            found.append(Problem("layer_types", "the layers with a window do not repeat regularly"))
    return found


def hyperparameters(family: Family, config: dict[str, Any]) -> Values:
    """GGUF's hyper-parameters of a model. Raises ModelError listing what config.json lacks."""
    values: Values = {}
    missing = []
    for field in family.fields:
        value = field_value(field, config)
        if value is None:
            missing.append(Problem(field.config, "missing from config.json"))
        else:
            values[f"{family.gguf}.{field.gguf}"] = (field.kind, value)
    if missing:
        raise ModelError.of(f"A {family.model_type} model needs more than its config.json says:", missing)
    head = head_size(config)
    for key in HEAD_KEYS:
        values[f"{family.gguf}.{key}"] = ("uint32", head)
    values |= gguf_rope.metadata(family.gguf, config, head)
    return values


def field_value(field: Field, config: dict[str, Any]) -> Any:
    """The value of one hyper-parameter, its default where config.json lacks it."""
    value = config.get(field.config)
    if value is None:
        value = field.default
        if isinstance(value, str) and value.startswith("="):
            value = config.get(value[1:])
    if value is None:
        return None
    return {"uint32": int, "float32": float, "bool": bool}[field.kind](value)


def head_size(config: dict[str, Any]) -> int:
    """The width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def read_family(header: GGUFHeader) -> Family:
    """The family of a GGUF file. Raises UnsupportedError for an architecture without a table."""
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedError(f"{header.path} holds a '{kind}', not a model.")
    found = families_in(header.architecture)
    if not found:
        known = ", ".join(sorted({one.gguf for one in FAMILIES}))
        raise UnsupportedError(
            f"{header.path}: architecture '{header.architecture}' cannot be read yet. Known: {known}."
        )
    mixture = any(name.startswith("blk.0.ffn_gate_exps") for name in header.tensors)
    return next((family for family in found if family.experts == mixture), found[0])


def configuration(family: Family, header: GGUFHeader) -> dict[str, Any]:
    """config.json of the model in a GGUF file. Raises FormatError listing missing or impossible hyper-parameters."""
    config: dict[str, Any] = {"architectures": [family.class_name], "model_type": family.model_type}
    problems: list[Problem] = []

    def take(key: str, kind: str) -> Any:
        value = header.metadata.get(f"{family.gguf}.{key}")
        if value is None:
            return None
        if not GOOD[kind](value):
            problems.append(Problem(f"{family.gguf}.{key}", f"found {shown(value)}, expected {GOOD_WORDS[kind]}"))
            return None
        return value

    for field in family.fields:
        value = take(field.gguf, field.kind)
        if value is None:
            value = stand_in(field, config, header)
        if value is None and not any(field.gguf in problem.where for problem in problems):
            problems.append(Problem(f"{family.gguf}.{field.gguf}", "missing"))
        config[field.config] = value
    if problems:
        raise FormatError.of(f"{header.path}: hyper-parameters of a {family.gguf} model", problems)
    config |= dict(family.defaults)
    for name, value, _ in family.required:
        config.setdefault(name, value)
    config |= {name: tensor in header.tensors for name, tensor in family.from_names}
    config["head_dim"] = take(HEAD_KEYS[0], "uint32") or head_size(config)
    if config["head_dim"] % 2:
        problems.append(
            Problem(
                f"{family.gguf}.{HEAD_KEYS[0]}", f"heads are {config['head_dim']} wide, which rotary pairs cannot be"
            )
        )
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config |= gguf_rope.configuration(header, family.gguf, config, take)
    if problems:
        raise FormatError.of(f"{header.path}: hyper-parameters of a {family.gguf} model", problems)
    add_particulars(config, header)
    return config


def stand_in(field: Field, config: dict[str, Any], header: GGUFHeader) -> Any:
    """What stands for a hyper-parameter that the file does not give."""
    if field.config == "vocab_size":
        table = header.tensors.get("token_embd.weight")
        return table.shape[0] if table else None
    if isinstance(field.default, str) and field.default.startswith("="):
        return config.get(field.default[1:])
    return field.default


def add_particulars(config: dict[str, Any], header: GGUFHeader) -> None:
    """What config.json says and GGUF leaves to the program."""
    kind = config["model_type"]
    if kind in ("gemma2", "gemma3_text"):
        scalar = assumed_scalar(config)
        config["query_pre_attn_scalar"] = int(scalar) if scalar.is_integer() else scalar
        config["hidden_activation"] = "gelu_pytorch_tanh"
    if kind == "smollm3":
        config["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]
    if kind == "mixtral":
        config.setdefault("sliding_window", None)
    for name in ("bos", "eos"):
        value = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(value, int):
            config[f"{name}_token_id"] = value


def is_count(value: Any) -> bool:
    """A whole number that a size can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def is_number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def is_flag(value: Any) -> bool:
    """A boolean."""
    return isinstance(value, bool)


GOOD_WORDS = {"uint32": "a whole number above 0", "float32": "a finite number", "bool": "true or false"}
GOOD: dict[str, Callable[[Any], bool]] = {"uint32": is_count, "float32": is_number, "bool": is_flag}


def shown(value: Any) -> str:
    """A metadata value in a message."""
    return f"an array of {len(value)}" if isinstance(value, list | np.ndarray) else repr(value)[:60]
