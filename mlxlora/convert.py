"""A Hugging Face model becomes an MLX model, checked against what it was made from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_map_with_path

from mlxlora import architecture, files, hub, mlxlm, probe, sentencepiece_model, torch_weights, weights
from mlxlora import model as models
from mlxlora.commands import command
from mlxlora.dtypes import Dtype
from mlxlora.errors import ConfigError, ModelError
from mlxlora.parameters import flat
from mlxlora.progress import Progress
from mlxlora.quantize import Kept, QuantizeConfig, dequantize, quantize

# further apart than this from its source, or from transformers, an unquantized model is another one (nats a token)
LARGEST_KL = 0.02
REFERENCE_BYTES = 4 << 30  # transformers is asked only about models up to this size


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did.

    out:             the new model directory
    source:          the directory that it was made from
    parameters:      how many weights it has
    bytes:           size of its weight files
    dtype:           of the weights that are not packed, in bytes the most common one
    quantization:    how it is quantized, or None
    bits_per_weight: over all weights, scales included
    kept:            layers that could not be quantized, and why
    difference:      the result against its source on a probe text, or None where that was not asked for
    reference:       the source as mlx-lm computes it against transformers, where that is installed
    tokenizer:       on how many strings a tokenizer made from sentencepiece was found equal to it, or None
    warnings:        what mlx-lm is known to compute differently for this model, and what could not be checked
    """

    out: Path
    source: Path
    parameters: int
    bytes: int
    dtype: str
    quantization: str | None
    bits_per_weight: float
    kept: tuple[Kept, ...] = ()
    difference: probe.Difference | None = None
    reference: probe.Difference | None = None
    tokenizer: int | None = None
    warnings: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        form = self.quantization or self.dtype
        lines = [
            f"{self.out}: {self.parameters / 1e6:,.1f} M parameters, {form}, {self.bits_per_weight:.2f} bits a weight, "
            f"{files.human_bytes(self.bytes)}"
        ]
        lines += [f"Not quantized: {one.path}: {one.reason}" for one in self.kept[:8]]
        lines += [f"… and {len(self.kept) - 8} more layers not quantized"] if len(self.kept) > 8 else []
        lines += [f"Against its source: {self.difference}"] if self.difference else []
        lines += [f"mlx-lm against transformers: {self.reference}"] if self.reference else []
        lines += [f"Tokenizer equal to sentencepiece on {self.tokenizer} strings"] if self.tokenizer else []
        lines += [f"Warning: {text}" for text in self.warnings]
        return "\n".join([*lines, "", f"next: {command('train', model=self.out, data='PATH', out='RUN')}"])


def convert(
    model: str,
    out: Path,
    *,
    revision: str | None = None,
    dtype: Dtype | None = None,
    quantize: QuantizeConfig = QuantizeConfig(),  # noqa: B008 - frozen
    dequantize: bool = False,
    check: bool = True,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
) -> Conversion:
    """Make an MLX model directory of a Hugging Face model, for mlxlora and for stock mlx-lm.

    Tensors pass through one shard at a time. The directory appears whole or not at all. Afterwards the result is held
    against its source on a probe text; where torch and transformers are installed, mlx-lm's reading of the source is
    held against theirs, too, and a model that mlx-lm gets wrong for no known reason is refused.

    Args:
        model: a Hugging Face model directory, or a name on the hub
        out: the directory to write; it must not exist
        revision: branch, tag or commit on the hub
        dtype: of the weights that are not quantized (default: as they are)
        quantize: quantize the result
        dequantize: undo a quantization
        check: compare the result with its source
        trust_remote_code: allow the model to run Python files of its own
        on_progress: called with what is being done, how much is done, and how much there is

    Raises:
        InputError: `out` exists
        ModelError: the source cannot be used, or mlx-lm computes something else than its authors
        UnsupportedError: the architecture is unknown, or nothing can be quantized
    """
    out = Path(out)
    if dequantize and quantize.active:
        raise ConfigError("--dequantize and --quantize contradict each other: choose one, or convert twice.")
    files.refuse_existing(out)
    path = hub.find(model, revision=revision)
    with _safetensors(path, out, on_progress) as source:
        plan = _Plan(source, quantize, dequantize, dtype, trust_remote_code)
        warnings = architecture.silently_wrong(architecture.spelled_both_ways(architecture.read_config(source)))
        with files.new_directory(out) as scratch:
            kept, strings = _write(plan, path, scratch, on_progress)
            result = _result(scratch, plan)
            difference, reference, unchecked = _compare(plan, path, scratch, on_progress) if check else (None, None, [])
    return Conversion(
        out=out,
        source=path,
        **result,
        kept=tuple(kept),
        difference=difference,
        reference=reference,
        tokenizer=strings,
        warnings=(*warnings, *unchecked),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    source: Path
    quantize: QuantizeConfig
    dequantize: bool
    dtype: Dtype | None
    trust_remote_code: bool

    def load(self) -> tuple[nn.Module, dict[str, Any]]:
        return models.load_network(self.source, trust_remote_code=self.trust_remote_code)


@contextlib.contextmanager
def _safetensors(path: Path, out: Path, on_progress: Progress | None) -> Iterator[Path]:
    """The source itself, or for one with PyTorch files a scratch copy beside `out` with safetensors."""
    torch_files = torch_weights.find(path)
    if not torch_files:
        yield path
        return
    architecture.read_config(path)
    with files.scratch_directory(out) as scratch:
        torch_weights.to_safetensors(torch_files, scratch, on_progress)
        models.copy_files(path, scratch, ("*.json", "*.py"))
        (scratch / "pytorch_model.bin.index.json").unlink(missing_ok=True)
        yield scratch


def _write(plan: _Plan, original: Path, scratch: Path, on_progress: Progress | None) -> tuple[list[Kept], int | None]:
    """Fill `scratch` with the converted model. Returns the layers that stayed, and the count of strings compared."""
    strings = None
    if sentencepiece_model.needed(original):
        strings = sentencepiece_model.convert(original, scratch)
    network, config = plan.load()
    kept: list[Kept] = []
    target = None if plan.dtype is None else getattr(mx, plan.dtype)
    if plan.dequantize:
        config = dequantize(network, config, target)
    if target is not None:
        _cast(network, target)
        config = {**config, "dtype": plan.dtype, "torch_dtype": plan.dtype}
    if plan.quantize.active:
        config, kept = quantize(network, config, plan.quantize)
    parameters = mlxlm.total_parameters(network)
    tensors: dict[str, mx.array] = flat(network.parameters())
    network.update(tree_map(lambda _: mx.array([]), network.parameters()))  # let every shard go when it is written
    weights.write(scratch, tensors, parameters=parameters, on_progress=on_progress)
    mlxlm.save_config(architecture.spelled_both_ways(config), scratch / "config.json")
    models.copy_files(original, scratch, (*models.TOKENIZER_FILES, *models.CARRIED))
    return kept, strings


def _cast(network: nn.Module, dtype: mx.Dtype) -> None:
    """Change the floating weights to `dtype`, but those that the model wants kept as they are."""
    allowed: Callable[[str], bool] = getattr(network, "cast_predicate", lambda _: True)

    def change(name: str, tensor: mx.array) -> mx.array:
        return tensor.astype(dtype) if mx.issubdtype(tensor.dtype, mx.floating) and allowed(name) else tensor

    network.update(tree_map_with_path(change, network.parameters()))


def _result(scratch: Path, plan: _Plan) -> dict[str, Any]:
    index = files.read_json(scratch / "model.safetensors.index.json")["metadata"]
    size, parameters = int(index["total_size"]), int(index["total_parameters"])
    sizes: dict[str, int] = {}
    for tensor in weights.read(scratch).values():
        if mx.issubdtype(tensor.dtype, mx.floating):
            name = str(tensor.dtype).rsplit(".", 1)[-1]
            sizes[name] = sizes.get(name, 0) + tensor.nbytes
    stored = files.read_json(scratch / "config.json").get("quantization")
    form = str(plan.quantize) if plan.quantize.active else None
    if form is None and isinstance(stored, dict):
        form = f"{stored.get('bits')} bits, groups of {stored.get('group_size')}, {stored.get('mode', 'affine')}"
    return {
        "parameters": parameters,
        "bytes": size,
        "dtype": max(sizes, key=sizes.__getitem__) if sizes else "none",
        "quantization": form,
        "bits_per_weight": size * 8 / max(parameters, 1),
    }


def _compare(
    plan: _Plan, original: Path, scratch: Path, on_progress: Progress | None
) -> tuple[probe.Difference | None, probe.Difference | None, list[str]]:
    """Hold the result against its source, and mlx-lm's reading of the source against that of transformers."""
    if on_progress is not None:
        on_progress("comparing with the source", 0, 1)
    try:
        tokenizer = models.load_tokenizer(scratch, trust_remote_code=plan.trust_remote_code)
    except ModelError as error:
        return None, None, [f"Not compared with its source: {str(error).replace(str(scratch), str(original))}"]
    vocabulary = architecture.text_config(architecture.read_config(scratch)).get("vocab_size", tokenizer.vocab_size)
    ids = probe.tokens(tokenizer, int(vocabulary))
    before = probe.streamed_log_probs(lambda: plan.load()[0], ids)
    after = probe.streamed_log_probs(
        lambda: models.load_network(scratch, trust_remote_code=plan.trust_remote_code)[0], ids
    )
    difference = probe.compare(before, after, ids)
    if not plan.quantize.active and difference.kl > LARGEST_KL:
        raise ModelError(f"The converted model is another model than its source: {difference}.")
    reference, note = _reference(plan, original, before, ids)
    if on_progress is not None:
        on_progress("comparing with the source", 1, 1)
    return difference, reference, note


def _reference(
    plan: _Plan, original: Path, ours: mx.array, ids: list[int]
) -> tuple[probe.Difference | None, list[str]]:
    """transformers' logits for the source against mlx-lm's, where it is installed and the model is small enough."""
    from importlib.util import find_spec

    size = sum(path.stat().st_size for path in weights.weight_files(plan.source))
    if find_spec("torch") is None or size > REFERENCE_BYTES or "quantization" in architecture.read_config(plan.source):
        return None, []
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, said = AutoModelForCausalLM.from_pretrained(
            str(original),
            dtype=torch.float32,
            trust_remote_code=False,
            attn_implementation="eager",
            output_loading_info=True,
        )
        if said["missing_keys"] or said["mismatched_keys"]:
            return None, []  # weights in MLX's layout: transformers would fill in random ones
        with torch.no_grad():
            theirs = torch.log_softmax(model.eval()(torch.tensor([ids])).logits[0].float(), dim=-1).numpy()
    except Exception as error:  # a model of its own code, an attention it does not have, no memory: nothing to compare
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, [f"Not compared with transformers, which does not load this model: {reason[:200]}"]
    finally:
        if shown:
            logging.enable_progress_bar()
    difference = probe.compare(mx.array(np.ascontiguousarray(theirs)), ours, ids)
    known = architecture.silently_wrong(architecture.spelled_both_ways(architecture.read_config(original)))
    if difference.kl > LARGEST_KL and not known:  # what is known is warned of, with the figure beside it
        raise ModelError(
            f"mlx-lm computes another model than transformers from {original}: {difference}. Nothing was written. "
            "With --check false it is converted all the same."
        )
    return difference, []
