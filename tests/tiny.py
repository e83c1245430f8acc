"""Tiny models and tokenizers, made in the test: random weights, hidden 32, two layers, a vocabulary of 512.

tiny.config("qwen3")                       a config.json as both mlx-lm and transformers read it
tiny.network("qwen3", seed=1)              an mlx-lm network with random weights
tiny.tokenizer(directory)                  a byte-level BPE tokenizer with a ChatML template
tiny.model_directory(path, "qwen3")        all of that as a model directory in MLX's layout
tiny.with_logits(directory, 0.5)           the model with its logits scaled
tiny.transformers_directory(path, "qwen3") the same by way of transformers, in Hugging Face's layout (needs torch)
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlxlora import architecture, mlxlm
from mlxlora.parameters import flat
from tests import families
from tests.families import VOCABULARY

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

FAMILIES = (*families.FAMILIES, "gpt2")


def config(family: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a tiny model of `family` (one of FAMILIES; "gemma3" is its text model), with `changes`."""
    family = {"gemma3": "gemma3_text"}.get(family, family)
    if family == "gpt2":
        return {**families.GPT2, **changes}
    common = {
        name: value
        for name, value in families.COMMON.items()
        if name != "rope_theta" or family not in families.NO_THETA
    }
    return {**common, "model_type": family, **families.FAMILIES[family], **changes}


def network(family: str, seed: int = 0, *, dtype: mx.Dtype = mx.float32, **changes: Any) -> nn.Module:
    """A network with random weights, large enough that logits differ visibly from token to token.

    mlx-lm may draw norms and gates as ones and zeros; here everything is random, so that nothing cancels by accident.
    """
    built = mlxlm.build(architecture.spelled_both_ways(config(family, **changes)))
    key = mx.random.key(seed)
    names = list(flat(built.parameters()))
    keys = dict(zip(names, mx.random.split(key, len(names)), strict=True))

    def draw(name: str, old: mx.array) -> mx.array:
        if not mx.issubdtype(old.dtype, mx.floating):
            return old
        noise = mx.random.normal(old.shape, key=keys[name])
        if old.ndim < 2:  # norms near one where they scale, biases near zero
            return ((1.0 if "norm" in name and "bias" not in name else 0.0) + 0.1 * noise).astype(dtype)
        return (noise * (0.5 if "embed" in name or "wte" in name else 1.0) / old.shape[-1] ** 0.5).astype(dtype)

    built.update(tree_map_with_path(draw, built.parameters()))
    mx.eval(built.parameters())
    built.eval()
    return built


@functools.cache
def _trained_tokenizer() -> str:
    """tokenizer.json, trained once a session: 512 entries of byte-level BPE over a little English, code and Unicode."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    text = [
        "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.",
        "user assistant system question answer hello thank you please one two three four five six seven eight nine ten",
        "SELECT name FROM people WHERE age > 30 ORDER BY name; def add(a, b): return a + b  # and so on, 1234567890",
        "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 東京は日本の首都です。 Привет, мир!",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(text * 4, trainer)
    fill = VOCABULARY - built.get_vocab_size()
    built.add_tokens([AddedToken(f"<|unused{i}|>", special=True) for i in range(fill)])
    return str(built.to_str(pretty=True))


def tokenizer(directory: Path, *, template: str | None = CHATML) -> Path:
    """Write a tokenizer of 512 entries with a ChatML template (or `template`; None for a model without one)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(_trained_tokenizer(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return directory


def model_directory(
    path: Path,
    family: str = "llama",
    quantize: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    dtype: mx.Dtype = mx.float32,
    template: str | None = CHATML,
    **changes: Any,
) -> Path:
    """A whole model directory in MLX's layout, which mlxlora and mlx-lm load.

    For the families whose `sanitize()` changes nothing (llama, qwen3, gemma, phi3, …) transformers loads it, too;
    for mixtures of experts and MLA use `transformers_directory`.
    quantize: `{"bits": 4, "group_size": 32, "mode": "affine"}` or a part of that
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    settings = config(family, **changes)
    built = network(family, seed, dtype=dtype, **changes)
    settings["torch_dtype"] = str(dtype).rsplit(".", 1)[-1]
    if quantize is not None:
        wanted = {"group_size": 32, "bits": 4, "mode": "affine", **quantize}
        nn.quantize(
            built,
            **wanted,
            class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % wanted["group_size"] == 0,
        )
        settings["quantization"] = settings["quantization_config"] = wanted
    kind = "pt" if quantize is None else "mlx"
    mx.save_safetensors(str(path / "model.safetensors"), flat(built.parameters()), metadata={"format": kind})
    (path / "config.json").write_text(json.dumps(settings, indent=2))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
    tokenizer(path, template=template)
    return path


def tensors(file: Path) -> dict[str, mx.array]:
    """The arrays of a file, as MLX itself reads them."""
    found: Any = mx.load(str(file))
    assert isinstance(found, dict)
    return found


def with_logits(directory: Path, deviation: float) -> Path:
    """The model with its final norm scaled so that the logits have this standard deviation over a few tokens."""
    from mlxlora.model import load_network

    file = directory / "model.safetensors"
    arrays = tensors(file)
    found = float(mx.std(load_network(directory)[0](mx.arange(11, 400, 20)[None])))
    stored_less_one = "gemma" in json.loads((directory / "config.json").read_text())["model_type"]
    for name in [name for name in arrays if name.startswith("model.norm.")]:
        less = 1.0 if stored_less_one and name.endswith("weight") else 0.0
        arrays[name] = (arrays[name] + less) * (deviation / found) - less
    mx.save_safetensors(str(file), arrays, metadata={"format": "pt"})
    return directory


def transformers_directory(path: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A model directory written by transformers (random weights, float32, Hugging Face's layout). Needs torch."""
    import torch
    import transformers

    path = Path(path)
    settings = {key: value for key, value in config(family, **changes).items() if key != "torch_dtype"}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "moe_statics" in name:
                parameter.zero_()  # the bias of ernie4_5_moe's routers, which mlx-lm leaves out
            elif parameter.ndim == 1:
                parameter.copy_((1.0 if "norm" in name and "bias" not in name else 0.0) + 0.1 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name or "wte" in name else 1.0) / parameter.shape[-1] ** 0.5)
    model.float().save_pretrained(path)
    if family in ("gemma4_text", "granitemoehybrid"):
        # as published files say it: this version of transformers writes per_layer_config, and "linear_attention"
        (path / "config.json").write_text(json.dumps(settings, indent=2))
    tokenizer(path)
    return path


def adapter_directory(path: Path, model: Path, *, seed: int = 0, size: float = 0.3, **changes: Any) -> Path:
    """An adapter for a model directory, with both factors random, so that it changes what the model says.

    size: how large its effect is; changes: of the AdapterConfig (rank, targets, type, …)
    """
    from mlxlora import adapters
    from mlxlora.model import fingerprint, load_network

    built, _ = load_network(model)
    wanted = adapters.AdapterConfig(**{"rank": 4, "alpha": 8.0, **changes})
    adapters.inject(built, wanted, seed=seed)
    key = mx.random.key(seed + 1)
    drawn = {}
    for name, value in flat(built.trainable_parameters()).items():
        key, now = mx.random.split(key)
        drawn[name] = value + size * mx.random.normal(value.shape, key=now) / value.shape[-1] ** 0.5
    built.load_weights(list(drawn.items()), strict=False)
    adapters.save_adapter(path, adapters.collect(built, base=fingerprint(model)))
    return path


def chats(path: Path, count: int) -> Path:
    """A file of short conversations, each with another question and the same answer."""
    with path.open("w") as file:
        for number in range(count):
            question = {"role": "user", "content": f"Say {number}" + " please" * (number % 5)}
            file.write(json.dumps({"messages": [question, {"role": "assistant", "content": "the one"}]}) + "\n")
    return path
