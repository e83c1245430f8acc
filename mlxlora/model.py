"""A model directory in and out: network, tokenizer and configuration, checked while they are read."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora import architecture, checkpoint_names, files, hub, mlxlm, sentencepiece_model, weights
from mlxlora.adapters import Adapters
from mlxlora.commands import command
from mlxlora.errors import ModelError, Problem
from mlxlora.parameters import flat
from mlxlora.progress import Progress
from mlxlora.tokenizer import Tokenizer

# copied beside the weights of every model that is written: all but weights and what is rewritten
CARRIED = ("generation_config.json", "*.py", "LICENSE*", "NOTICE*")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip


@dataclass(eq=False)
class LanguageModel:
    """A model that is loaded: what mlxlora's verbs work on.

    network:   mlx-lm's module; `network(tokens)` gives logits
    tokenizer: its `mlxlora.tokenizer.Tokenizer`
    config:    its configuration, the rotary settings in both spellings
    path:      the directory that it was read from
    trust_remote_code: whether it may run Python files of its own
    """

    network: nn.Module
    tokenizer: Tokenizer
    config: dict[str, Any]
    path: Path
    trust_remote_code: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """What tells this base model from any other, in 64 hex digits; see `weights.fingerprint`."""
        return fingerprint(self.path)

    @cached_property
    def adapters(self) -> Adapters:
        """The adapters on this model: add, list, change scales, remove; see `mlxlora.adapters.Adapters`."""
        return Adapters(self.network, lambda: self.fingerprint)

    @cached_property
    def generation_tokenizer(self) -> Any:
        """mlx-lm's wrapper of the tokenizer, for its generator."""
        return mlxlm.load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)

    @property
    def vocabulary(self) -> int:
        """How many token ids the network knows (its logits may be wider than the tokenizer's vocabulary)."""
        return int(architecture.text_config(self.config).get("vocab_size", self.tokenizer.vocab_size))


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: Sequence[str] = (),
    lazy: bool = False,
) -> LanguageModel:
    """Load a model directory, or a model of the Hugging Face hub, with any number of adapters on it.

    revision:          branch, tag or commit on the hub
    trust_remote_code: allow the model to run Python files of its own; they must lie inside its directory
    adapter:           `PATH` or `PATH=SCALE` each; a run directory will do
    lazy:              leave the weights on disk until they are used
    Raises ModelError for anything that is wrong with the model, naming all missing, unknown and misshapen tensors.
    """
    path = hub.find(source, revision=revision)
    network, config = load_network(path, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    model = LanguageModel(network, tokenizer, config, path, trust_remote_code)
    if not lazy:
        mx.eval(network.parameters())
    for spec in adapter:
        model.adapters.add_spec(spec)
    return model


def load_network(path: Path, *, trust_remote_code: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a model directory with its weights mapped (not read), and its configuration in both spellings."""
    stored = architecture.read_config(path)
    own_code = architecture.check_supported_files(path, stored, trust_remote_code=trust_remote_code)
    weights.weight_files(path)
    network, config = mlxlm.load_network(
        path,
        architecture.spelled_both_ways(stored),
        classes=None if own_code is None else _own_classes(own_code),
        check=_check_weights(path),
        prepare=lambda built, tensors: checkpoint_names.prepared(built, stored, tensors),
    )
    if own_code is not None:
        config["model_file"] = stored["model_file"]
    return network, config


def _own_classes(path: Path) -> tuple[type[nn.Module], type[Any]]:
    """Model and arguments from the model's own Python file, which the user has agreed to run."""
    spec = importlib.util.spec_from_file_location(f"mlxlora_trusted_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in ("Model", "ModelArgs") if not hasattr(module, name)]
    if missing:
        raise ModelError(f"{path} defines no {' and no '.join(missing)}, which mlx-lm needs.")
    return module.Model, module.ModelArgs


def _check_weights(path: Path) -> Callable[[nn.Module, dict[str, mx.array]], None]:
    def check(network: nn.Module, given: dict[str, mx.array]) -> None:
        expected: dict[str, mx.array] = flat(network.parameters())
        problems = [Problem(name, "missing from the weight files") for name in sorted(expected.keys() - given.keys())]
        problems += [
            Problem(name, "in the weight files, but not in the network")
            for name in sorted(given.keys() - expected.keys())
        ]
        problems += [
            Problem(name, f"has shape {list(given[name].shape)}, the network needs {list(expected[name].shape)}")
            for name in sorted(expected.keys() & given.keys())
            if given[name].shape != expected[name].shape
        ]
        problems += [
            Problem(
                name, f"holds {str(given[name].dtype).rpartition('.')[2]}, the network needs floating-point numbers"
            )
            for name in sorted(expected.keys() & given.keys())
            if mx.issubdtype(expected[name].dtype, mx.floating) and not mx.issubdtype(given[name].dtype, mx.floating)
        ]
        if problems:
            raise ModelError.of(f"The weights of {path} do not fit the network of its config.json:", problems)

    return check


def load_tokenizer(path: Path | str, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a model directory.

    Raises ModelError when there is none, or when it is a sentencepiece file alone: only a conversion checks that the
    fast tokenizer made of it encodes alike.
    """
    path = Path(path)
    if sentencepiece_model.needed(path):
        raise ModelError(
            f"{path} has its tokenizer as a sentencepiece file alone. Convert the model, which makes a fast tokenizer "
            f"of it and checks that both encode alike: {command('convert', model=path, out='DIR')}"
        )
    return Tokenizer.load(path, trust_remote_code=trust_remote_code)


def fingerprint(path: Path) -> str:
    """The fingerprint of the model in a directory, without loading it."""
    return weights.fingerprint(path, architecture.read_config(path))


def save(
    model: LanguageModel,
    out: Path,
    *,
    on_progress: Progress | None = None,
) -> Path:
    """Write a model directory that mlxlora and stock mlx-lm load: weights in shards, config.json, tokenizer.

    The directory appears whole or not at all. Raises InputError when `out` exists.
    """
    with files.new_directory(Path(out)) as scratch:
        write_directory(scratch, model.network, model.config, source=model.path, on_progress=on_progress)
    return Path(out)


def write_directory(
    directory: Path,
    network: nn.Module,
    config: dict[str, Any],
    *,
    source: Path,
    on_progress: Progress | None = None,
) -> None:
    """Fill `directory` with a model: the network's weights, `config`, and the tokenizer files of `source`."""
    tensors: dict[str, mx.array] = flat(network.parameters())
    weights.write(directory, tensors, parameters=mlxlm.total_parameters(network), on_progress=on_progress)
    mlxlm.save_config(config, directory / "config.json")
    copy_files(source, directory, (*TOKENIZER_FILES, *CARRIED))


def copy_files(source: Path, directory: Path, patterns: Sequence[str]) -> list[str]:
    """Copy the files of `source` that match, byte for byte; those already there are kept. Returns the names copied.

    Raises ModelError for links out of `source`.
    """
    found = {path for pattern in patterns for path in Path(source).glob(pattern) if path.is_file()}
    names = [str(path.relative_to(source)) for path in sorted(found)]
    wanted = [name for name in names if not (directory / name).exists()]
    architecture.refuse_links_out(source, wanted)
    for name in wanted:
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(source) / name, directory / name)
    return wanted
