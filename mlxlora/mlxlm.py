"""The seam to mlx-lm: the only file that imports it, and only inside functions.

Everything that mlxlora takes from mlx-lm passes through here, so that `import mlxlora` stays quick, a new version of
mlx-lm meets one file, and the habits of a program (limits of the process changed on import, `exit(1)` inside a model)
end here instead of in the middle of somebody's training run.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxlora.errors import ModelError, UnsupportedError, nearest

_import_lock = threading.Lock()


def module(name: str = "") -> ModuleType:
    """A module of mlx-lm by its name below the package (`"utils"`, `"models.cache"`), imported without side effects.

    mlx-lm lowers the process's limit of open files when it is imported, the hard limit included, which cannot be taken
    back; the call is held off while the import runs.
    """
    full = f"mlx_lm.{name}" if name else "mlx_lm"
    if full in sys.modules:
        return sys.modules[full]
    with _import_lock, _limits_kept():
        return importlib.import_module(full)


@contextlib.contextmanager
def _limits_kept() -> Iterator[None]:
    try:
        import resource
    except ImportError:  # no such thing on this platform
        yield
        return
    keep = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = keep


@contextlib.contextmanager
def _as_errors(what: str) -> Iterator[None]:
    """Turn the ways in which mlx-lm's models give up into a ModelError, and keep what they print off stdout."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except SystemExit as stop:
        last = said.getvalue().strip().splitlines()[-1:]
        raise ModelError(f"{what}: mlx-lm gave up{': ' + last[0] if last else ''} (exit {stop.code}).") from None
    except (
        ValueError, KeyError, TypeError, AttributeError, IndexError, ImportError, ArithmeticError, AssertionError,
        RuntimeError,
    ) as error:  # fmt: skip
        detail = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise ModelError(f"{what}: mlx-lm cannot build this model. {detail}") from error


# ---- models -------------------------------------------------------------------------------------------------------


def model_types() -> list[str]:
    """The names that config.json may give as `model_type`: mlx-lm's models and its aliases."""
    models = module("models")
    helpers = {"base", "cache", "activations", "rope_utils", "switch_layers", "bitlinear_layers", "gated_delta"}
    helpers |= {"ssm", "mla", "pipeline"}
    found = {info.name for info in pkgutil.iter_modules(models.__path__) if not info.ispkg}
    aliases = cast(dict[str, str], module("utils").MODEL_REMAPPING)
    return sorted((found - helpers) | set(aliases))


def model_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type[Any]]:
    """The model class of mlx-lm for this configuration, and the class of its arguments.

    Raises UnsupportedError for a model type that mlx-lm does not have.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError("config.json names no model_type, so the architecture is unknown.")
    try:
        return cast(tuple[type[nn.Module], type[Any]], module("utils")._get_classes(config))
    except ValueError as error:
        if isinstance(error.__cause__, ImportError) and error.__cause__.name not in (None, f"mlx_lm.models.{kind}"):
            raise ModelError(f"mlx-lm's model '{kind}' needs {error.__cause__.name}, which is not installed.") from None
        raise UnsupportedError(
            f"mlx-lm {version()} has no model of type '{kind}'.{nearest(kind, model_types())} "
            "A newer mlx-lm may have it: pip install -U mlx-lm"
        ) from None


def build(config: dict[str, Any]) -> nn.Module:
    """A network of this configuration with freshly drawn weights (lazy: nothing is computed before it is used)."""
    model_class, arguments = model_classes(config)
    with _as_errors(f"A network of type '{config['model_type']}'"):
        # the arguments keep the dictionaries they are given, and some models write into them
        network = cast(Any, model_class)(arguments.from_dict(_copied(config)))
    return _whole(network)


def _whole(network: nn.Module) -> nn.Module:
    """The network, not training, and with what `nn.Module` sets up, which recurrent_gemma's constructor forgets."""
    if "_no_grad" not in vars(network):
        nn.Module.__init__(network)
    network.eval()
    return network


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def load_network(
    directory: Path,
    changes: dict[str, Any],
    *,
    classes: tuple[type[nn.Module], type[Any]] | None = None,
    check: Callable[[nn.Module, dict[str, mx.array]], None],
    prepare: Callable[[nn.Module, dict[str, mx.array]], dict[str, mx.array]],
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a model directory and load its weights lazily, quantized as its configuration says.

    changes: laid over config.json; classes: model and argument class instead of mlx-lm's own (for model-supplied code)
    check:   called as `check(network, weights)` with the sanitized weights right before they are loaded; raises what is
             wrong with them
    prepare: `prepare(network, weights)` brings the tensors of the files into the form that `sanitize()` expects
    Returns the network (nothing evaluated, not in training mode) and the configuration that mlx-lm settled on.
    """
    used: list[type[nn.Module]] = []

    def with_check(config: dict[str, Any]) -> tuple[type[nn.Module], type[Any]]:
        base, arguments = classes or model_classes(config)
        used.append(base)
        return _checked(base, check, prepare), arguments

    with _as_errors(str(directory)), _randomness_kept():
        network, config = module("utils").load_model(
            directory,
            lazy=True,
            strict=True,
            model_config={**_copied(changes), "model_file": None},
            get_model_classes=with_check,
        )
    network.__class__ = used[0]
    config.pop("model_file", None)
    return _whole(cast(nn.Module, network)), cast(dict[str, Any], config)


@contextlib.contextmanager
def _randomness_kept() -> Iterator[None]:
    """Layers draw first weights when they are made, which loading replaces: no reason to move MLX's global state."""
    high, low = np.array(cast(Any, mx.random.state)[0]).tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # a key is the two halves of its seed


def _checked(
    base: type[nn.Module],
    check: Callable[[nn.Module, dict[str, mx.array]], None],
    prepare: Callable[[nn.Module, dict[str, mx.array]], dict[str, mx.array]],
) -> type[nn.Module]:
    """A subclass for the time of loading, whose `load_weights` reports all that is wrong instead of the first thing."""

    def load_weights(self: nn.Module, weights: list[tuple[str, mx.array]], strict: bool = True) -> nn.Module:
        check(self, dict(weights))
        return base.load_weights(self, weights, strict=strict)

    inner = getattr(base, "sanitize", None)

    def sanitize(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        weights = prepare(self, weights)
        return cast(dict[str, mx.array], inner(self, weights)) if inner is not None else weights

    return type(base.__name__, (base,), {"load_weights": load_weights, "sanitize": sanitize})


def sanitized(network: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """What the network's own `sanitize()` makes of tensors as they stand in a Hugging Face checkpoint.

    `weights` stays as it is: the models take entries out of the dictionary that they are given.
    """
    inner = getattr(network, "sanitize", None)
    if inner is None:
        return dict(weights)
    with _as_errors(f"{type(network).__module__.rsplit('.', 1)[-1]}.sanitize"):
        return cast(dict[str, mx.array], inner(dict(weights)))


def switch_layers() -> ModuleType:
    """mlx-lm's expert layers: `SwitchLinear`, `QuantizedSwitchLinear` and what uses them."""
    return module("models.switch_layers")


def prompt_cache(network: nn.Module) -> list[Any]:
    """A fresh key/value cache, one entry a layer, as the network wants it."""
    return cast(list[Any], module("models.cache").make_prompt_cache(network))


def load_config(directory: Path) -> dict[str, Any]:
    """config.json as mlx-lm reads it (end-of-text ids from generation_config.json included)."""
    return cast(dict[str, Any], module("utils").load_config(directory))


def save_config(config: dict[str, Any], path: Path) -> None:
    """Write config.json as mlx-lm does: sorted, both names for the quantization, infinities tagged."""
    module("utils").save_config(dict(config), path, keep_vision_config=True)


def mixed_recipe(name: str, network: nn.Module, group_size: int) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """mlx-lm's predicate for a mixed quantization (`mixed_2_6`, `mixed_3_4`, `mixed_3_6`, `mixed_4_6`)."""
    with _as_errors(f"The recipe {name}"):
        builder = module("convert").mixed_quant_predicate_builder
        return cast(Callable[[str, nn.Module], bool | dict[str, Any]], builder(name, network, group_size))


def total_parameters(network: nn.Module) -> int:
    """The number of weights, each packed one counted."""
    return int(module("utils").get_total_parameters(network))


# ---- tokenizers and generation ------------------------------------------------------------------------------------


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """mlx-lm's wrapper of a tokenizer: streaming detokenizer, end-of-text ids, marks of thinking and of tool calls."""
    eos = load_config(directory).get("eos_token_id")
    with _as_errors(f"The tokenizer of {directory}"):
        # said out loud, because transformers asks on stdin where it is left open
        loaded = module("utils").load_tokenizer(directory, {"trust_remote_code": trust_remote_code}, eos_token_ids=eos)
        pieces = getattr(loaded._detokenizer, "tokenmap", None)
        if pieces is not None:  # the others decode, which leaves unknown ids out
            loaded._detokenizer.tokenmap = _Pieces(pieces, loaded.get_vocab())
    return loaded


class _Pieces:
    """A streaming detokenizer's pieces by id, in which an id that stands for nothing says nothing.

    Networks are often wider than their vocabulary: filled up to a round number. Such an id may be drawn, and then
    mlx-lm's detokenizers say "!" or raise IndexError. They count the vocabulary, too, and so leave out the last tokens
    of one whose ids have gaps.
    """

    def __init__(self, pieces: Sequence[Any], vocabulary: dict[str, int]) -> None:
        self._pieces = {number: piece for number, piece in enumerate(pieces) if piece is not None}
        self._nothing = type(next(iter(self._pieces.values()), ""))()
        for text, number in vocabulary.items():
            if number >= len(pieces):
                self._pieces[number] = text if isinstance(self._nothing, str) else text.encode()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> Any:
        return self._pieces.get(number, self._nothing)


def with_stops(tokenizer: Any, stops: Sequence[int]) -> Any:
    """The same wrapper of a tokenizer with more ids that end a text; the given one stays as it is."""
    made = copy.copy(tokenizer)
    made.eos_token_ids = {*tokenizer.eos_token_ids, *stops}
    return made


def with_chats(tokenizer: Any, render: Callable[..., Any]) -> Any:
    """The same wrapper with another `apply_chat_template(messages, **options)`, which all of mlx-lm asks for chats."""
    made = copy.copy(tokenizer)
    made.has_chat_template = True
    made.apply_chat_template = render
    return made


def kept_cache(
    network: nn.Module, cache: list[Any] | None, held: Sequence[int], prompt: Sequence[int]
) -> tuple[Any, int]:
    """A key/value cache for `prompt`, and how many of its tokens it holds already.

    cache, held: the cache of an earlier prompt and answer, and their tokens; what both have in common from the start is
    used again where the cache can be cut back to it. At least one token of the prompt is always left to be read.
    """
    common = 0
    for mine, theirs in zip(held, prompt[:-1], strict=False):
        if mine != theirs:
            break
        common += 1
    cached = module("models.cache")
    if cache and common and cached.can_trim_prompt_cache(cache):
        size = int(getattr(cache[0], "offset", 0))
        surplus = size - common
        if surplus >= 0 and cached.trim_prompt_cache(cache, surplus) == surplus:
            return cache, common
        if 0 < size < common:
            return cache, size
    return prompt_cache(network), 0


def stream_generate(network: nn.Module, tokenizer: Any, prompt: Sequence[int], **options: Any) -> Iterator[Any]:
    """mlx-lm's generator: yields responses with `text`, `token`, `logprobs`, `finish_reason`, counts and speeds."""
    return cast(Iterator[Any], module("generate").stream_generate(network, tokenizer, list(prompt), **options))


def sampling_filters(*, top_p: float, min_p: float, top_k: int) -> Callable[[mx.array], mx.array]:
    """mlx-lm's filters on log-probabilities, in its order; 1, 0 and 0 leave everything in."""
    utils = module("sample_utils")

    def keep(log_probs: mx.array) -> mx.array:
        if top_p < 1:
            log_probs = utils.apply_top_p(log_probs, top_p)
        if min_p > 0:
            log_probs = utils.apply_min_p(log_probs, min_p)
        if 0 < top_k < log_probs.shape[-1]:
            log_probs = utils.apply_top_k(log_probs, top_k)
        return log_probs

    return keep


def make_logits_processors(**options: Any) -> Any:
    """mlx-lm's logits processors: `repetition_penalty`, `repetition_context_size`, `logit_bias`."""
    return module("sample_utils").make_logits_processors(**options)


def load_adapters(network: nn.Module, directory: Path) -> nn.Module:
    """Stock mlx-lm's own way of putting an adapter on a network; for tests that compare ours with it."""
    return cast(nn.Module, module("tuner.utils").load_adapters(network, str(directory)))


def version() -> str:
    """The version of mlx-lm, found without importing it."""
    from importlib.metadata import version as installed

    return installed("mlx-lm")
