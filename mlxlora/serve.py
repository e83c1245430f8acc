"""mlx-lm's OpenAI-compatible server behind our adapters and our checks."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import sys
import threading
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxlora import mlxlm
from mlxlora.connections import Guarded, Listener
from mlxlora.errors import ConfigError, MlxLoraError
from mlxlora.model import LanguageModel, load
from mlxlora.prompts import chat_tokenizer
from mlxlora.requests import DEFAULT_MODEL, LOOPBACK, Rules

TOKEN_VARIABLE = "MLXLORA_TOKEN"


@dataclass(frozen=True, slots=True)
class Served:
    """What a server did until it was stopped."""

    address: str
    requests: int
    refused: int

    def __str__(self) -> str:
        return f"{self.address}: {self.requests} requests answered, {self.refused} refused"


def serve(
    model: str,
    *,
    adapter: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
    origins: list[str] | None = None,
    max_tokens: int = 8192,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Served:
    """Answer OpenAI-compatible requests until Ctrl-C.

    Clients choose adapters by name, one request at a time: `"model": "NAME"` for the model with that adapter, the
    model's own name for none, `"adapters": {"NAME": 0.5, …}` for a mixture. They cannot name files, other models or
    addresses.

    Args:
        model: a model directory, or a name on the hub
        adapter: `PATH` or `PATH=SCALE`, any number; a run directory will do. Its directory's name is its name
        host: the address to listen on; any other than this machine's own needs a token
        port: the port to listen on; 0 takes a free one
        token: what clients have to send as `Authorization: Bearer TOKEN` (default: $MLXLORA_TOKEN)
        origins: web pages whose scripts may call the server, such as http://localhost:3000
        max_tokens: the longest answer that a client may ask for
        revision: branch, tag or commit on the hub
        trust_remote_code: allow the model to run Python files of its own

    Raises:
        ConfigError: the address needs a token, or is in use
        ModelError, AdapterError: something is wrong with the model or an adapter
    """
    given = token if token is not None else os.environ.get(TOKEN_VARIABLE)
    check_address(host, port, given, max_tokens, origins or ())
    loaded = load(model, revision=revision, trust_remote_code=trust_remote_code, adapter=adapter or ())
    server = Server(loaded, host=host, port=port, token=given, origins=origins or (), max_tokens=max_tokens)
    names = ", ".join(server.rules.names())
    with server:
        try:
            print(f"Listening on {server.address}/v1 (models: {names}). Ctrl-C stops.", file=sys.stderr, flush=True)
            server.wait()
        except KeyboardInterrupt:
            print("stopping", file=sys.stderr)
    return Served(server.address, server.answered, server.refused)


def check_address(host: str, port: int, token: str | None, max_tokens: int, origins: Sequence[str] = ()) -> None:
    """Raise ConfigError for an address that would be open to others without a token, and for values that cannot be."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; give 0 to 65535.")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; give 1 or more.")
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError("The token must be at least 16 printable ASCII characters without spaces.")
    for origin in origins:
        if not re.fullmatch(r"https?://[^/\s]+", origin):  # a browser writes it so, and any other would never match
            raise ConfigError(f"--origins {origin} is no origin. Write it as http://localhost:3000, without a path.")
    if not host:
        raise ConfigError("--host is empty. Give an address, such as 127.0.0.1, or leave it out.")
    if host.lower() not in LOOPBACK and token is None:
        raise ConfigError(
            f"--host {host} can be reached from other machines, so clients have to prove themselves: give --token, "
            f"such as --token {secrets.token_urlsafe(24)}, or set {TOKEN_VARIABLE}."
        )


class Server:
    """A server in threads of its own, as a context manager.

        with Server(model, port=0) as server:
            print(server.address)

    answered, refused: how many requests so far
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        token: str | None = None,
        origins: Sequence[str] = (),
        max_tokens: int = 8192,
    ) -> None:
        """Bind the address; nothing is answered before the `with` block.

        Raises ConfigError when the address needs a token, cannot be had, or an adapter's name is the model's.
        """
        check_address(host, port, token, max_tokens, origins)
        name = model.path.resolve().name
        if name in model.adapters:
            raise ConfigError(f"An adapter has the name of the model, '{name}'. Rename its directory.")
        self._answer_lock = threading.Lock()
        self.answered = self.refused = 0
        self._provider = _Provider(model, max_tokens, origins)
        handler = type("Handler", (Guarded, mlxlm.module("server").APIHandler), {"owner": self})
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            server_class = type("Listener", (Listener,), {"address_family": family})
            self._listener = server_class(address, lambda *args: handler(self._generator, *args))
        except OSError as error:
            raise ConfigError(f"{host}:{port} cannot be listened on: {error.strerror or error}.") from None
        self.rules = Rules(
            host=host,
            port=self._listener.server_address[1],
            token=token,
            origins=frozenset(origins),
            model=name,
            adapters=dict(model.adapters.scales),
            vocabulary=model.vocabulary,
            max_tokens=max_tokens,
        )
        self._generator: Any = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """`http://host:port`."""
        shown = f"[{self.rules.host}]" if ":" in self.rules.host else self.rules.host
        return f"http://{shown}:{self.rules.port}"

    def __enter__(self) -> Server:
        server = mlxlm.module("server")
        cache = mlxlm.module("models.cache").LRUPromptCache(self._provider.cli_args.prompt_cache_size)
        self._generator = server.ResponseGenerator(self._provider, cache)
        self._thread = threading.Thread(target=self._listener.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        self._generator.stop_and_join()
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        """Wait until the server is stopped, or its generator has died. Raises MlxLoraError for the latter."""
        assert self._thread is not None
        while self._thread.is_alive():
            self._thread.join(0.5)
            if not self._generator.is_healthy:
                raise MlxLoraError("The generator died; see the messages above. Please report this.")

    def count(self, *, refused: bool) -> None:
        """Note a request."""
        with self._answer_lock:
            if refused:
                self.refused += 1
            else:
                self.answered += 1


class _Provider:
    """What mlx-lm's generator asks for models: it has one, and sets the scales of its adapters."""

    draft_model = None
    processor = None

    def __init__(self, model: LanguageModel, max_tokens: int, origins: Sequence[str]) -> None:
        self._model = model
        self.model: Any = model.network
        self.tokenizer: Any = chat_tokenizer(model)
        self.model_key: tuple[str, str | None, str | None] | None = None
        cache = mlxlm.prompt_cache(model.network)
        self.is_batchable = all(hasattr(layer, "merge") for layer in cache)
        self.cli_args = Namespace(
            model=None, adapter_path=None, draft_model=None, num_draft_tokens=0, chat_template="", pipeline=False,
            chat_template_args={},
            use_default_chat_template=False, trust_remote_code=False, allowed_origins=list(origins), temp=0.0,
            top_p=1.0, top_k=0, min_p=0.0, max_tokens=min(512, max_tokens), decode_concurrency=32, prompt_concurrency=8,
            prefill_step_size=2048, prompt_cache_size=10, prompt_cache_bytes=None, kv_bits=None, kv_group_size=64,
            quantized_kv_start=5000,
        )  # fmt: skip

    def load_default(self) -> None:
        """Nothing to do: the model is loaded."""

    def load(self, model: str, adapter: str | None = None, draft: str | None = None) -> tuple[Any, Any]:
        """Set the scales that a request asks for (see `Rules.selection`). Called while nothing is generated."""
        key = (DEFAULT_MODEL, adapter, None)  # caches are kept by the scales, whatever name asked for them
        if self.model_key != key:
            self._model.adapters.set_scales(json.loads(adapter) if adapter else {})
            mx.eval(self._model.network.parameters())
            self.model_key = key
        return self.model, self.tokenizer

    def reset(self) -> None:
        """The generator has ended."""
        self.model_key = None
