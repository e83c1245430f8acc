"""A model's tokenizer: text to token ids and back, with the place in the text that each token comes from.

The work is done by the Rust `tokenizers` library; `Tokenizer.hf` is the transformers tokenizer around it, for whoever
needs it (mlx-lm's generator, saving). *Control tokens* are the special tokens of the vocabulary (`<|im_end|>`, `</s>`):
only a chat template may write them. Text that merely spells one, such as a question about `<|im_end|>`, is plain text:
see `encode_ids` and `encode_aliased`.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxlora import hub
from mlxlora.architecture import check_numbers
from mlxlora.errors import ModelError, UnsupportedError
from mlxlora.tokenizer_file import check_own_code, check_speed, check_tokenizer_file, panics

IntArray = npt.NDArray[np.int32]
NEEDED = (
    "A model directory needs tokenizer.json (or tokenizer.model) and tokenizer_config.json: take them from its source."
)
ALIAS_OPEN, ALIAS_CLOSE = "\U0010fffd", "\U0010fffc"  # private-use characters that spell a control token unmistakably


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids of one text and where each comes from.

    ids:    int32 [T]
    starts: int32 [T]; first character of each token
    ends:   int32 [T]; one past its last character
    """

    ids: IntArray
    starts: IntArray
    ends: IntArray


class Tokenizer:
    """The tokenizer of one model.

    >>> tokenizer = Tokenizer.load("models/Qwen3-0.6B")     # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode("Hello").ids)     # doctest: +SKIP
    'Hello'
    """

    def __init__(self, hf: Any, *, path: Path | None = None) -> None:
        """Wrap a transformers tokenizer.

        Raises UnsupportedError when it is not backed by the `tokenizers` library: offsets into the text are needed.
        """
        backend = getattr(hf, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedError(
                f"{path or type(hf).__name__}: this tokenizer is not a fast tokenizer (no tokenizer.json), so tokens "
                "cannot be traced back to the text. Convert the model with `mlxlora convert`, which writes one."
            )
        self.hf = hf
        self.path = path
        self._backend = backend
        self._secret = f"{secrets.token_hex(8)}-"

    @classmethod
    def load(cls, path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
        """Load the tokenizer of a model directory or hub id (fetched where it is not yet here).

        Raises ModelError when there is none that can be read, or when it wants to run code from outside its directory.
        """
        from transformers import AutoTokenizer

        path = hub.find(path, revision=revision)
        if (path / "tokenizer.json").is_file():
            check_tokenizer_file(path / "tokenizer.json")
        check_numbers(path)
        if trust_remote_code:
            check_own_code(path)
        try:
            hf = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        except BaseException as error:  # transformers, tokenizers and the hub raise whatever they like
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # a panic in Rust
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if not [*path.glob("config.json"), *path.glob("tokenizer*")]:
                reason = "there is no config.json, so this is no model directory."
            raise ModelError(f"{path}: the tokenizer cannot be loaded: {reason.rstrip('.: ')}. {NEEDED}") from None
        loaded = cls(hf, path=path)
        # without its files transformers makes an empty one of the class that config.json names
        if set(loaded._backend.get_vocab(with_added_tokens=False)) <= set(loaded.control_tokens):
            raise ModelError(f"{path}: there is no vocabulary, so this model has no tokenizer. {NEEDED}")
        check_speed(loaded._backend, path)
        return loaded

    # -- vocabulary ---------------------------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return int(max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)) + 1

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token, if there is one."""
        return None if self.hf.bos_token_id is None else int(self.hf.bos_token_id)

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-text token, if there is one."""
        return None if self.hf.eos_token_id is None else int(self.hf.eos_token_id)

    @property
    def pad_id(self) -> int:
        """An id to fill batches with: the padding token, else the end-of-text token, else 0. It is never a target."""
        pad = self.hf.pad_token_id
        return int(pad) if pad is not None else (self.eos_id or 0)

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Text and id of every special token."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: int(number) for number, token in added.items() if token.special}

    @cached_property
    def control_pattern(self) -> re.Pattern[str] | None:
        """Finds the spelling of any control token in a text; None when the vocabulary has none."""
        spelled = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(re.escape(text) for text in spelled)) if spelled else None

    @cached_property
    def special_variables(self) -> dict[str, str]:
        """What a chat template may refer to: bos_token, eos_token and the like."""
        return {name: str(value) for name, value in self.hf.special_tokens_map.items() if isinstance(value, str)}

    @cached_property
    def adds_bos(self) -> bool:
        """Whether plain text is to begin with the beginning-of-text token (Llama and Gemma: yes; Qwen: no)."""
        ids = self._backend.encode("a", add_special_tokens=True).ids
        return self.bos_id is not None and bool(ids) and ids[0] == self.bos_id

    @property
    def chat_template(self) -> str | None:
        """The model's chat template (Jinja source), if it has one; of several, the one named `default`."""
        return self.chat_templates.get("default")

    @property
    def chat_templates(self) -> dict[str, str]:
        """The model's chat templates by name (`default`, and for some models `tool_use`)."""
        template = self.hf.chat_template
        if isinstance(template, dict):
            named = {str(name): str(source) for name, source in template.items()}
            if "default" not in named and len(named) == 1:
                named["default"] = next(iter(named.values()))
            return named
        return {"default": str(template)} if template else {}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the ids of a text: vocabulary, merges, normalisation and special tokens."""
        state = self._backend.to_str()
        state = state[state.index('"added_tokens"') :]  # before it: truncation and padding of whoever called last
        known = state + json.dumps(self.special_variables, sort_keys=True)
        return hashlib.sha256(known.encode("utf-8", "surrogatepass")).hexdigest()

    # -- text to ids --------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> Encoding:
        """Encode one text as it stands: control tokens are recognised, nothing is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Encode many texts in parallel: control tokens are recognised, nothing is added. Offsets are characters."""
        return [_encoding(item) for item in self._batch(self._exact, texts)]

    def encode_ids(self, texts: Sequence[str], *, control: bool = False) -> list[IntArray]:
        """Ids alone, faster than `encode_batch`. `control=False` takes spelled control tokens as plain text."""
        backend = self._exact
        if not control and self.control_pattern is not None:
            marked = [index for index, text in enumerate(texts) if self.control_pattern.search(text)]
            if marked:
                plain = {index: self.encode_aliased([texts[index]])[0].ids for index in marked}
                rest = [text for index, text in enumerate(texts) if index not in plain]
                encoded = iter(self._batch(backend, rest, places=False))
                return [
                    plain[index] if index in plain else np.array(next(encoded).ids, np.int32)
                    for index in range(len(texts))
                ]
        return [np.array(item.ids, np.int32) for item in self._batch(backend, texts, places=False)]

    def encode_aliased(self, texts: Sequence[str]) -> list[Encoding]:
        """Encode texts in which control tokens are spelled by `alias`; their ordinary spelling is plain text here."""
        backend, ids = self._aliased
        encodings = [_encoding(item) for item in self._batch(backend, texts)]
        if not ids:
            return encodings
        return [
            Encoding(np.array([ids.get(int(i), int(i)) for i in item.ids], np.int32), item.starts, item.ends)
            for item in encodings
        ]

    def _batch(self, backend: Any, texts: Sequence[str], *, places: bool = True) -> list[Any]:
        encode = backend.encode_batch if places else backend.encode_batch_fast
        with panics(self.path):
            return list(encode(list(texts), add_special_tokens=False))

    def alias(self, control_token: str) -> str:
        """The spelling of a control token that `encode_aliased` recognises; no text can know it beforehand."""
        return f"{ALIAS_OPEN}{self._secret}{self.control_tokens[control_token]}{ALIAS_CLOSE}"

    def decode(self, ids: Sequence[int] | IntArray, *, skip_special: bool = False) -> str:
        """Text of `ids`."""
        with panics(self.path):
            return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def token(self, number: int) -> str:
        """The vocabulary's own spelling of one id (`Ġhello`, `▁hello`, `<|im_end|>`)."""
        return str(self._backend.id_to_token(int(number)) or f"<{number}>")

    @cached_property
    def _exact(self) -> Any:
        """The backend, without truncation and padding, and without trimming of offsets.

        A copy: transformers changes the state of the original with every call. The byte-level post-processor moves
        offsets past leading and trailing spaces, so that a token of spaces would belong to no place in the text.
        """
        state = json.loads(self._backend.to_str())
        return _backend_of(state)

    @cached_property
    def _aliased(self) -> tuple[Any, dict[int, int]]:
        """A copy of the backend whose control tokens are spelled by private-use characters, and a map of its ids.

        One pass over the text gives the same ids as the original, because every other step stays as it is: a control
        token written by the template is split off under its alias, and one that the content spells is not special.
        """
        state = json.loads(self._backend.to_str())
        vocabulary = state["model"].get("vocab")
        for token in state["added_tokens"]:
            if not token["special"]:
                continue
            text, number = token["content"], token["id"]
            token["content"] = alias = self.alias(text)
            if isinstance(vocabulary, dict):
                # without an entry the copy would number its control tokens anew, and the ordinary spelling must not
                # be found as one piece of the vocabulary
                vocabulary.pop(text, None)
                vocabulary[alias] = number
            elif isinstance(vocabulary, list) and number < len(vocabulary) and vocabulary[number][0] == text:
                vocabulary[number][0] = alias
            _rename(state["model"], text, alias)
        backend = _backend_of(state)
        ids = {}
        for text, number in self.control_tokens.items():
            received = backend.token_to_id(self.alias(text))
            if received != number:
                ids[int(received)] = number
        return backend, ids


def _rename(model: dict[str, Any], text: str, alias: str) -> None:
    """Keep a model's own reference to a renamed piece."""
    if model.get("unk_token") == text:
        model["unk_token"] = alias


def _backend_of(state: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer as Backend

    state["truncation"] = state["padding"] = state["post_processor"] = None
    try:
        return Backend.from_str(json.dumps(state))
    except Exception as error:
        raise ModelError(
            f"the tokenizer contradicts itself: {error}. Take tokenizer.json from its source again."
        ) from None


def _encoding(item: Any) -> Encoding:
    offsets = np.array(item.offsets, np.int32).reshape(-1, 2)
    return Encoding(np.array(item.ids, np.int32), offsets[:, 0], offsets[:, 1])
