"""config.json: read with care, spelled so that every reader understands it, and judged.

transformers 5 writes the rotary settings as `rope_parameters`, transformers 4 and most of mlx-lm's models read
`rope_theta` and `rope_scaling`, and whoever finds the other spelling silently takes defaults: another model, without an
error. `spelled_both_ways` writes both. `silently_wrong` names what mlx-lm computes otherwise than the model's authors
whatever the configuration says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mlxlora import files
from mlxlora.errors import ModelError, Problem

Config = dict[str, Any]

# the names by which architectures say what `rope_parameters` calls rope_theta and partial_rotary_factor
_THETA_NAMES = {"gpt_neox": "rotary_emb_base"}
_PARTIAL_NAMES = {"gpt_neox": "rotary_pct"}
# two names for one setting: readers know one or the other
_SYNONYMS = (("num_experts", "num_local_experts"), ("dtype", "torch_dtype"))


def read_config(directory: Path) -> Config:
    """config.json of a model directory, as it stands there.

    Raises ModelError when it is missing, no JSON object, or names no model_type.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} holds no config.json, so it is no model directory.")
    config = files.read_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds {type(config).__name__}, not an object.")
    problems = [
        Problem(name, f"must be {what}, not {config[name]!r}")
        for name, kind, what in (("model_type", str, "a name"), ("text_config", dict, "an object"))
        if name in config and not isinstance(config[name], kind)
    ]
    problems += _numbers_beyond_measure(config)
    if "model_type" not in config:
        problems.append(Problem("model_type", "is missing, so the architecture is unknown"))
    if problems:
        raise ModelError.of(f"{path} cannot be used:", problems)
    return config


# Beyond these a number is a mistake or an attack: building the network would take the machine's memory first. The
# largest models known have 162 blocks, a width of 53,248 and 512 experts.
_LARGEST = {
    ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_experts", "num_local_experts", "n_routed_experts"):
        10_000,
    ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads",
     "head_dim", "vocab_size", "n_embd", "n_head", "kv_lora_rank", "q_lora_rank"): 10_000_000,
}  # fmt: skip


# what a network computes with, and finds to be no number only when it is used
_REAL = (
    "rope_theta", "rotary_emb_base", "partial_rotary_factor", "rotary_pct", "rms_norm_eps", "layer_norm_eps",
    "layer_norm_epsilon", "norm_eps", "norm_epsilon", "max_position_embeddings", "sliding_window",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "logits_scaling",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "routed_scaling_factor",
)  # fmt: skip
_LONGEST = 10_000  # entries of a list: one for each block, at most


def check_numbers(directory: Path) -> None:
    """Raise ModelError for numbers in config.json beyond measure: libraries make a list of so many blocks."""
    path = Path(directory) / "config.json"
    config = files.read_json(path) if path.is_file() else {}
    problems = _numbers_beyond_measure(config) if isinstance(config, dict) else []
    if problems:
        raise ModelError.of(f"{path} cannot be used:", problems)


def _numbers_beyond_measure(config: Config) -> list[Problem]:
    parts = [("", config)]
    if isinstance(config.get("text_config"), dict):
        parts.append(("text_config.", config["text_config"]))
    strange = [
        Problem(f"{where}{name}", f"must be a number, not {str(part[name])[:40]!r}")
        for where, part in parts
        for name in _REAL
        if part.get(name) is not None and type(part[name]) not in (int, float)
    ]
    strange += [
        Problem(f"{where}{name}", f"has {len(value):,} entries, more than any model has blocks")
        for where, part in parts
        for name, value in part.items()
        if isinstance(value, list) and len(value) > _LONGEST
    ]
    return strange + [
        Problem(f"{where}{name}", f"must be a whole number from 0 to {largest:,}, not {str(part[name])[:40]}")
        for where, part in _nested("", config)
        for names, largest in _LARGEST.items()
        for name in names
        if isinstance(part.get(name), int | float) and not (type(part[name]) is int and 0 <= part[name] <= largest)
    ]


def _nested(where: str, part: Config) -> Iterator[tuple[str, Config]]:
    """An object and those in it, each with the dotted name that stands before its settings."""
    yield where, part
    for name, value in part.items():
        if isinstance(value, dict):
            yield from _nested(f"{where}{name}.", value)


def text_config(config: Config) -> Config:
    """The part of a configuration that describes the language model (multimodal models nest it)."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def spelled_both_ways(config: Config) -> Config:
    """A copy of `config` in which rotary settings (and what else has two names) stand in both spellings.

    What is already there is kept; nothing is invented where neither spelling says anything.
    """
    spelled = dict(config)
    if isinstance(spelled.get("text_config"), dict):
        spelled["text_config"] = spelled_both_ways(spelled["text_config"])
    for one, other in _SYNONYMS:
        if one in spelled or other in spelled:
            spelled.setdefault(one, spelled.get(other))
            spelled.setdefault(other, spelled.get(one))
    parameters = spelled.get("rope_parameters")
    if isinstance(parameters, dict) and parameters:
        if all(isinstance(value, dict) for value in parameters.values()):
            _spell_per_layer_type(spelled, parameters)
        else:
            _spell_old(spelled, parameters)
    elif "rope_theta" in spelled or isinstance(spelled.get("rope_scaling"), dict):
        _spell_new(spelled)
    return spelled


def _spell_old(config: Config, parameters: Config) -> None:
    """`rope_theta`, `rope_scaling`, `partial_rotary_factor` from `rope_parameters`."""
    kind = str(config.get("model_type", ""))
    if "rope_theta" in parameters:
        config.setdefault("rope_theta", parameters["rope_theta"])
        if kind in _THETA_NAMES:
            config.setdefault(_THETA_NAMES[kind], parameters["rope_theta"])
    if "partial_rotary_factor" in parameters:
        config.setdefault("partial_rotary_factor", parameters["partial_rotary_factor"])
        if kind in _PARTIAL_NAMES:
            config.setdefault(_PARTIAL_NAMES[kind], parameters["partial_rotary_factor"])
    if config.get("rope_scaling") is None:
        config["rope_scaling"] = _scaling(parameters)  # None is said, too: some models demand the key
    original = parameters.get("original_max_position_embeddings")
    if original is not None and parameters.get("rope_type", parameters.get("type")) in ("longrope", "su"):
        config.setdefault("original_max_position_embeddings", original)


def _scaling(parameters: Config) -> Config | None:
    """`rope_scaling` with its kind under both names, or None where nothing is scaled."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    left = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return {**left, "rope_type": kind, "type": kind}


def _spell_per_layer_type(config: Config, parameters: Config) -> None:
    """The same for models whose kinds of layer rotate differently (Gemma 3 and its like)."""
    full, sliding = parameters.get("full_attention"), parameters.get("sliding_attention")
    # mlx-lm reads these in the new spelling alone, and transformers fails on them in the old one
    new_alone = config.get("model_type") == "mellum"
    if full is not None and full.get("rope_type") != "proportional" and not new_alone:
        _spell_old(config, full)
    if sliding is not None and "rope_theta" in sliding and not new_alone:
        config.setdefault("rope_local_base_freq", sliding["rope_theta"])
    layers = config.get("layer_types")
    if "sliding_window_pattern" not in config and isinstance(layers, list) and "full_attention" in layers:
        period = layers.index("full_attention") + 1
        regular = all((kind == "full_attention") == ((i + 1) % period == 0) for i, kind in enumerate(layers))
        if regular:
            config["sliding_window_pattern"] = period


def _spell_new(config: Config) -> None:
    """`rope_parameters` from `rope_theta`, `rope_scaling` and what else stands beside them."""
    if config.get("rope_local_base_freq") is not None or "rope_parameters" in config:
        return  # per-layer-type settings: transformers itself reads the old spelling of these
    scaling = config.get("rope_scaling")
    scaling = dict(scaling) if isinstance(scaling, dict) else {}
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if isinstance(config.get("rope_scaling"), dict):
        config["rope_scaling"] = {**config["rope_scaling"], "rope_type": kind, "type": kind}
    parameters: Config = {"rope_type": kind, **scaling}
    for name in ("rope_theta", "partial_rotary_factor"):
        if config.get(name) is not None:
            parameters.setdefault(name, config[name])
    config["rope_parameters"] = parameters


def silently_wrong(config: Config) -> list[str]:
    """What mlx-lm 0.32 computes differently from this model's authors, without an error: one sentence each.

    Found by comparing logits with transformers. Empty for a model on which both agree.
    """
    text = text_config(config)
    kind = text.get("model_type", config.get("model_type"))
    found = []
    window, longest = text.get("sliding_window"), text.get("max_position_embeddings")
    uses_window = kind in ("mistral", "gemma2") or (kind == "qwen2" and text.get("use_sliding_window", False))
    if uses_window and isinstance(window, int) and (not isinstance(longest, int) or window < longest):
        found.append(
            f"mlx-lm attends over the whole context, where this {kind} model was made with a window of {window}: "
            f"texts longer than {window} tokens get other logits. Keep to {window} tokens."
        )
    partial = text.get("partial_rotary_factor", 1.0)
    if kind == "glm" and partial not in (None, 1.0):
        found.append(f"mlx-lm's glm rotates another part of each head than this model's {partial:g}: logits differ.")
    scaling = text.get("rope_scaling")
    scaled = isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) in ("longrope", "su")
    if scaled:
        original = text.get("original_max_position_embeddings", 4096)
        found.append(
            f"mlx-lm uses longrope's long factors at every length; this model was made with its short factors for "
            f"texts of up to {original} tokens: their logits differ."
        )
    rope = text.get("rope_parameters")
    if kind == "olmo3" and isinstance(rope, dict) and isinstance(rope.get("sliding_attention"), dict):
        thetas = {part.get("rope_theta") for part in rope.values() if isinstance(part, dict)}
        if len(thetas) > 1:
            found.append("mlx-lm rotates the sliding layers of this olmo3 model like its full ones: logits differ.")
    kept = text.get("index_topk")
    if kind == "deepseek_v32" and isinstance(kept, int) and (not isinstance(longest, int) or kept < longest):
        found.append(
            f"mlx-lm and transformers do not choose the same {kept} tokens to attend to: texts longer than that get "
            "other logits."
        )
    if kind == "gpt_oss" and isinstance(scaling, dict) and scaling.get("truncate") is False:
        found.append("mlx-lm rounds the bounds of YaRN's ramp, which gpt_oss does not: logits differ by about 2e-2.")
    if kind == "jamba" and text.get("num_experts", 1) > text.get("num_experts_per_tok", 2):
        found.append("mlx-lm weighs this jamba model's chosen experts to one, its authors do not: logits differ.")
    if kind == "falcon_h1" and (text.get("key_multiplier", 1) != 1 or text.get("attention_in_multiplier", 1) != 1):
        found.append("mlx-lm leaves out the factors on this falcon_h1 model's keys and values: logits differ.")
    if kind == "ernie4_5_moe":
        found.append("mlx-lm leaves out the bias with which this model's routers choose experts: logits differ.")
    if kind in ("gemma", "recurrent_gemma", "starcoder2", "gpt_neox"):
        found.append(
            "mlx-lm uses the exact GELU where this model's authors use its tanh form: logits differ by about 5e-4."
        )
    return found


def check_supported_files(directory: Path, config: Config, *, trust_remote_code: bool) -> Path | None:
    """Decide about model-supplied code: the file to run, or None where there is none to run.

    Raises ModelError when the model wants its own code run and that was not allowed, or when the file is missing or
    lies outside the model directory.
    """
    wanted = config.get("model_file")
    if wanted is None:
        return None
    if not isinstance(wanted, str):
        raise ModelError(f"{directory}/config.json: model_file must be a file name, not {wanted!r}.")
    if not trust_remote_code:
        raise ModelError(
            f"{directory} wants to run its own code ({wanted}) to build its network. Read that file; if you trust it, "
            "run again with --trust_remote_code."
        )
    path = Path(directory) / wanted
    if not lies_inside(directory, wanted):
        raise ModelError(f"{directory}/config.json: model_file {wanted!r} lies outside the model directory.")
    if path.suffix != ".py" or not path.is_file():
        raise ModelError(f"{directory}/config.json: model_file {wanted!r} is no Python file in the model directory.")
    logging.getLogger("mlxlora").warning("running the model's own code: %s", path)
    return path


def refuse_links_out(directory: Path, names: Iterable[str]) -> None:
    """Raise ModelError for files that are links out of the directory: what is copied or sent would be somebody's."""
    problems = [
        Problem(name, f"is a link to {(Path(directory) / name).resolve()}", "Put the file itself in its place")
        for name in names
        if not lies_inside(directory, name)
    ]
    if problems:
        raise ModelError.of(f"{directory} holds links to files outside of it, which are not passed on:", problems)


def lies_inside(directory: Path, name: str) -> bool:
    """Whether a file that a model names belongs to it.

    The hub's cache keeps the files of a repository beside its snapshots, which hold links to them: those belong to it.
    """
    root = Path(directory).resolve()
    cached = root.parent.name == "snapshots" and (root.parents[1] / "blobs").is_dir()
    owner = root.parents[1] if cached else root
    plain = not Path(name).is_absolute() and ".." not in Path(name).parts
    return plain and (root / name).resolve().is_relative_to(owner)
