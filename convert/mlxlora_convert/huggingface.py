"""`--to hf`: a model directory that transformers loads, with adapters folded in and quantization undone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxlora import architecture, checkpoint_names, hub, mlxlm, probe, weights
from mlxlora import model as models
from mlxlora.adapters import Adapters
from mlxlora.adapters.heads import Half
from mlxlora.adapters.inject import set_module
from mlxlora.adapters.layer import Wrapper
from mlxlora.errors import ModelError, Problem, UnsupportedError
from mlxlora.files import check_safetensors
from mlxlora.parameters import flat
from mlxlora.quantize import dequantize
from mlxlora_convert import transformers_reader
from mlxlora_convert.checkpoint_layout import (
    ANEW,
    NOTES,
    VISION_LEFT_OUT,
    rules,
    settings,
    text_part,
    to_checkpoint,
)
from mlxlora_convert.hf_options import HuggingFaceOptions
from mlxlora_convert.jobs import ExportJob
from mlxlora_convert.probe import NotReadBack, Probe, ReadBack

# how far the exported model may be from adapter-on-base on the probe text, in nats a token: rounding to its dtype
LARGEST_KL = 0.01
# and how far transformers' log-probabilities from ours: by the dtype that was written
BOUNDS = {"float32": 5e-3, "float16": 0.1, "bfloat16": 0.5}


def write(job: ExportJob) -> list[str]:
    """Fill `job.out`. Raises UnsupportedError for an architecture whose checkpoint layout is not known.

    The tensors are proven before they are written: mlx-lm's own `sanitize()` has to make of them, name by name and bit
    by bit, the tensors that they were made from. What was written is loaded and held against the model on a probe text.
    """
    path = hub.find(job.base, revision=job.revision)
    stored = architecture.read_config(path)
    if stored.get("model_file") is not None:
        raise UnsupportedError(f"{path} has a network of its own code ({stored['model_file']}): transformers has none.")
    inner = text_part(stored)
    rules(inner or stored)
    dtype = job.option(HuggingFaceOptions).dtype
    _prove(job, path, stored, dtype)
    network, config = folded(job, path, dtype)
    tensors = to_checkpoint(flat(network.parameters()), config)
    parameters = mlxlm.total_parameters(network)
    del network
    weights.write(job.out, tensors, parameters=parameters, metadata={"format": "pt"}, on_progress=job.on_progress)
    _write_config(path, stored, config, job.out, new=inner is not None)
    models.copy_files(path, job.out, (*models.TOKENIZER_FILES, *models.CARRIED))
    notes = [] if "quantization" not in stored else ["Quantization was undone: the weights are its rounded values."]
    if inner is not None:
        notes.append(
            f"mlx-lm keeps the language model of a {stored['model_type']} alone: written as a {inner['model_type']}."
        )
    elif stored["model_type"] in VISION_LEFT_OUT and "text_config" in stored:
        notes.append("mlx-lm keeps the language model alone: load this with AutoModelForCausalLM, it has no vision.")
    elif stored["model_type"] in NOTES:
        notes.append(NOTES[stored["model_type"]])
    return [*notes, *_check(job, path)]


def folded(job: ExportJob, path: Path, dtype: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The job's model with its adapters folded in and without quantization (lazy), and its configuration.

    Of a multimodal model this is the text model inside it.
    """
    network, config = models.load_network(path, trust_remote_code=job.trust_remote_code)
    target = None if dtype is None else getattr(mx, dtype)
    _adapted(job, path, network)
    for place, layer in list(network.named_modules()):
        if isinstance(layer, Wrapper) and not isinstance(layer, Half):  # the whole of it comes by itself
            set_module(network, place, layer.fuse(dequantize=True, dtype=target))
    if any("scales" in module for _, module in network.named_modules()):
        config = dequantize(network, config, target)
    config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    if target is not None:
        network.set_dtype(target)
        config = {**config, "dtype": dtype, "torch_dtype": dtype}
    inner = text_part(config)
    if inner is None:
        return network, {**config, **settings(config, getattr(network, "args", None))}
    text: nn.Module = network["language_model"]
    return text, {**inner, "vocab_size": int(text.model.embed_tokens.weight.shape[0])}


def _adapted(job: ExportJob, path: Path, network: nn.Module) -> None:
    adapters = Adapters(network, lambda: models.fingerprint(path))
    for spec in job.adapter:
        adapters.add_spec(spec, any_base=job.any_base)


def _prove(job: ExportJob, path: Path, stored: dict[str, Any], dtype: str | None) -> None:
    """Undo the export with mlx-lm's own code and compare: names, shapes and bits. One tensor in memory at a time."""
    network, config = folded(job, path, dtype)
    expected = flat(network.parameters())
    given = to_checkpoint(expected, config)
    fresh = mlxlm.build(config)  # some models rearrange themselves while they sanitize
    back = mlxlm.sanitized(fresh, checkpoint_names.prepared(fresh, config, given))
    del given
    network.update(tree_map(lambda _: mx.array([]), network.parameters()))
    problems = [Problem(name, "is lost on the way") for name in sorted(expected.keys() - back.keys())]
    problems += [Problem(name, "is left over on the way") for name in sorted(back.keys() - expected.keys())]
    names = sorted(expected.keys() & back.keys())
    for number, name in enumerate(names, 1):
        one, other = expected.pop(name), back.pop(name)
        if one.shape != other.shape or one.dtype != other.dtype or not bool(mx.array_equal(one, other, equal_nan=True)):
            problems.append(Problem(name, "does not come back as it was"))
        del one, other
        job.progress("checking the layout", number, len(names))
    if problems:
        raise UnsupportedError(
            f"'{stored['model_type']}' cannot be exported: mlx-lm does not read the checkpoint back as this model.\n"
            + "\n".join(f"  {problem}" for problem in problems[:20])
        )


def _write_config(path: Path, stored: dict[str, Any], config: dict[str, Any], out: Path, *, new: bool) -> None:
    """config.json byte for byte where nothing of it changes; a `new` one for a model of another type."""
    if new:
        (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    changed: dict[str, Any] = {
        key: config.get(key)
        for key in ("dtype", "torch_dtype", "quantization", "quantization_config")
        if key in stored and config.get(key) != stored[key]
    }
    changed |= {key: config[key] for key in ANEW.get(str(stored["model_type"]), ())}
    if not changed:
        (out / "config.json").write_bytes((path / "config.json").read_bytes())
        return
    kept = {key: value for key, value in {**stored, **changed}.items() if value is not None or key not in changed}
    (out / "config.json").write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(job: ExportJob, path: Path) -> list[str]:
    """Load what was written, hold it against the model with its adapters. Raises ModelError when it is another one."""
    if not (job.out / "tokenizer.json").exists():
        return ["Not compared on a probe text: the model has no tokenizer.json."]
    tokenizer = models.load_tokenizer(job.out)
    config = architecture.text_config(architecture.read_config(job.out))
    ids = probe.tokens(tokenizer, int(config.get("vocab_size", tokenizer.vocab_size)))

    def source() -> nn.Module:
        network, _ = models.load_network(path, trust_remote_code=job.trust_remote_code)
        _adapted(job, path, network)
        return network

    before = probe.streamed_log_probs(source, ids)
    after = probe.streamed_log_probs(lambda: models.load_network(job.out)[0], ids)
    difference = probe.compare(before, after, ids)
    if difference.kl > LARGEST_KL:
        raise ModelError(
            f"The exported model is not the one it was made from: {difference}. Nothing was written. "
            "Where its dtype is too narrow for the adapter, try --hf.dtype float32."
        )
    return [f"Loaded again: {difference}"]


def read_back(job: ExportJob, expected: Probe) -> ReadBack:
    """Run transformers on what was written. Raises NotReadBack where it is not installed or has not got the memory."""
    transformers_reader.refuse_missing("transformers")
    shapes = (shape for path in weights.weight_files(job.out) for _, shape in check_safetensors(path).values())
    transformers_reader.refuse_large(sum(math.prod(shape) for shape in shapes))
    try:
        model, said = transformers_reader.load(job.out)
    except Exception as error:  # transformers raises whatever it likes for a model that it does not have
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotReadBack(f"Not read back: transformers does not load this model: {reason[:200]}") from None
    wrong = [*said["missing_keys"], *said["unexpected_keys"], *said["mismatched_keys"]]
    if wrong:
        raise ModelError(f"transformers does not find the tensors it expects: {', '.join(map(str, wrong[:5]))}.")
    theirs = transformers_reader.log_probs(model, expected.tokens)
    del model  # before ours is computed
    config = architecture.read_config(job.out)
    bound = BOUNDS.get(str(config.get("dtype", config.get("torch_dtype"))), BOUNDS["bfloat16"])
    seen = expected.compare("transformers", theirs, bound)
    known = architecture.silently_wrong(architecture.spelled_both_ways(config))
    if seen.difference > bound and known:
        raise NotReadBack(f"{seen}: mlx-lm computes this model otherwise than transformers. {known[0]}")
    return seen
