"""What a client may ask of `mlxlora serve`: everything is checked here before mlx-lm's server sees it.

A local server is reached by every web page that its user opens, so a request proves where it comes from (Host, Origin,
content type, token), names only what the server was started with, and holds only values that the generator survives.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

MAX_BODY = 16 << 20  # bytes of a request
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# arguments of the template that a client may set; others would reach the machinery around it, or replace the template
TEMPLATE_ARGUMENTS = frozenset({"enable_thinking", "thinking", "reasoning_effort", "add_vision_id", "date_string"})
DEFAULT_MODEL = "default_model"  # what mlx-lm calls the model that was not named


class Refused(Exception):
    """A request that is not answered: an HTTP status, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def refuse(reason: str, status: int = 400) -> NoReturn:
    """Raise Refused."""
    raise Refused(status, reason)


@dataclass(frozen=True)
class Rules:
    """What a server allows.

    host:       the address that it listens on
    port:       its port
    token:      what clients have to send as `Authorization: Bearer …`, or None on loopback
    origins:    web pages (`https://example.org`) whose scripts may call it
    model:      the name of the model without adapters
    adapters:   name → scale with which each adapter was started
    vocabulary: number of token ids
    max_tokens: the longest answer that a client may ask for
    """

    host: str
    port: int
    token: str | None
    origins: frozenset[str]
    model: str
    adapters: Mapping[str, float] = field(default_factory=dict)
    vocabulary: int = 0
    max_tokens: int = 8192

    # -- where a request comes from -----------------------------------------------------------------------------------

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Raise Refused for a request that a foreign web page, or somebody without the token, has sent."""
        self._check_host(headers.get("Host"))
        origin = headers.get("Origin")
        if origin is not None and origin not in self.origins:
            refuse(
                f"Scripts of {origin[:200]!r} may not call this server: it was not started with --origins for them.",
                403,
            )
        if origin is None and headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            refuse("Requests from other web pages are refused.", 403)
        if self.token is not None:
            kind, _, given = (headers.get("Authorization") or "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                refuse("This server needs its token, as 'Authorization: Bearer TOKEN'.", 401)

    def _check_host(self, host: str | None) -> None:
        """A page that rebinds its name to this machine sends its own name as Host."""
        if not host:
            refuse("The request has no Host header.")
        name, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "")
        name = name.strip("[]").lower().rstrip(".")
        if port and port != str(self.port):
            refuse("The Host header names another port.", 421)
        known = {*LOOPBACK, self.host.lower()}
        if name not in known and not (self._listens_everywhere() and _is_address(name)):
            refuse(f"This server does not answer for the host {name[:200]!r}.", 421)

    def _listens_everywhere(self) -> bool:
        return self.host in ("0.0.0.0", "::", "")

    # -- what it asks -------------------------------------------------------------------------------------------------

    def check_body(self, path: str, content_type: str | None, raw: bytes) -> dict[str, Any]:
        """The body of a request as mlx-lm's server may have it. Raises Refused."""
        if (content_type or "").partition(";")[0].strip().lower() != "application/json":
            refuse("The content type must be application/json.", 415)
        try:
            body = json.loads(raw.decode("utf-8"), parse_constant=lambda text: refuse(f"{text} is no JSON number."))
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
            refuse(f"The body is not valid JSON: {error}.")
        if not isinstance(body, dict):
            refuse("The body must be a JSON object.")
        body["adapters"] = self.selection(body.get("model"), body.get("adapters"))
        body["model"] = body.get("model") or DEFAULT_MODEL
        if body.pop("draft_model", None) not in (None, DEFAULT_MODEL):
            refuse("There is no draft model on this server.")
        self._check_numbers(body)
        self._check_texts(path, body)
        return body

    def selection(self, model: Any, adapters: Any) -> str:
        """Which adapters a request wants, written as mlx-lm's server carries it: a JSON object of name → scale.

        model:    the name of the model (no adapters), of one adapter, or nothing (all adapters as they were started)
        adapters: `{"name": scale, …}`, `["name", …]` or `"name=scale,name"`; it goes before what `model` says
        """
        wanted: dict[str, float]
        if model is None or model == DEFAULT_MODEL:
            wanted = dict(self.adapters)
        elif model == self.model:
            wanted = {}
        elif isinstance(model, str) and model in self.adapters:
            wanted = {model: self.adapters[model]}
        else:
            refuse(f"There is no model {str(model)[:200]!r} here. There are: {', '.join(self.names())}.", 404)
        if adapters is not None:
            wanted = self._adapters(adapters)
        return json.dumps({name: wanted.get(name, 0.0) for name in self.adapters}, sort_keys=True)

    def _adapters(self, given: Any) -> dict[str, float]:
        if isinstance(given, str):
            given = [part.strip() for part in given.split(",") if part.strip()]
        if isinstance(given, list) and all(isinstance(part, str) for part in given):
            parts = [part.rpartition("=") if "=" in part else (part, "", "") for part in given]
            given = {name: scale or self.adapters.get(name, 1.0) for name, _, scale in parts}
        if not isinstance(given, dict):
            refuse('"adapters" must be an object of names and scales, a list of names, or "name=scale,name".')
        result = {}
        for name, scale in given.items():
            if name not in self.adapters:
                known = ", ".join(self.adapters) or "none"
                refuse(f"There is no adapter {str(name)[:200]!r} here. There are: {known}.", 404)
            try:
                result[name] = float(scale) if not isinstance(scale, bool) else math.nan
            except (TypeError, ValueError):
                result[name] = math.nan
            if not math.isfinite(result[name]) or abs(result[name]) > 100:
                refuse(f"The scale of the adapter {name!r} must be a number from -100 to 100.")
        return result

    def names(self) -> list[str]:
        """What a request may name as its model."""
        return [self.model, *self.adapters]

    def _check_numbers(self, body: dict[str, Any]) -> None:
        """Values that would end the generator, or reach past an array, and not only the one request."""
        for name in ("max_tokens", "max_completion_tokens"):
            value = body.get(name)
            if value is None:
                body.pop(name, None)
            elif not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= self.max_tokens:
                refuse(f"{name} must be a whole number from 1 to {self.max_tokens}.")
        for name, (low, high) in BOUNDS.items():
            value = body.get(name)
            if value is None:
                body.pop(name, None)
            elif isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                refuse(f"{name} must be a number from {low:g} to {high:g}.")
            elif name.startswith("xtc_"):
                body[name] = float(value)  # mlx-lm takes no whole number here
        top_k = body.get("top_k")
        if top_k is not None and (not isinstance(top_k, int) or top_k >= self.vocabulary):
            refuse(f"top_k must be a whole number below {self.vocabulary}.")
        bias = body.get("logit_bias")
        if bias is not None:
            ok = isinstance(bias, dict) and all(
                _is_id(token, self.vocabulary) and _is_bias(v) for token, v in bias.items()
            )
            if not ok or len(bias) > 1024:
                refuse(
                    "logit_bias must be an object of at most 1024 token ids of this model and numbers from -100 to 100."
                )

    def _check_texts(self, path: str, body: dict[str, Any]) -> None:
        stop = body.get("stop")
        stops = [stop] if isinstance(stop, str) else stop
        if stops is not None and not (isinstance(stops, list) and len(stops) <= 16 and all(_is_text(s) for s in stops)):
            refuse("stop must be a text, or at most 16 texts, with something in them.")
        options = body.get("stream_options")
        if options is not None:
            if not isinstance(options, dict):
                refuse("stream_options must be an object.")
            body["stream_options"] = {"include_usage": options.get("include_usage") is True}
        arguments = body.get("chat_template_kwargs")
        if arguments is not None:
            plain = isinstance(arguments, dict) and all(
                isinstance(v, bool | int | float | str) for v in arguments.values()
            )
            if not plain or not set(arguments) <= TEMPLATE_ARGUMENTS:
                refuse(f"chat_template_kwargs may hold: {', '.join(sorted(TEMPLATE_ARGUMENTS))}.")
        body.pop("role_mapping", None)
        if path.endswith("/chat/completions"):
            _check_messages(body.get("messages"))
            tools = body.get("tools")
            if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
                refuse("tools must be a list of objects.")
        elif not _is_text(body.get("prompt")):
            refuse("prompt must be a text with something in it.")


BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "top_k": (0, 1 << 30), "repetition_penalty": (0, 100),
    "repetition_context_size": (0, 1 << 20), "presence_penalty": (-100, 100), "presence_context_size": (0, 1 << 20),
    "frequency_penalty": (-100, 100), "frequency_context_size": (0, 1 << 20), "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1), "top_logprobs": (-1, 10), "seed": (0, 2**63 - 1), "num_draft_tokens": (0, 16),
}  # fmt: skip


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        refuse("messages must be a list with at least one message.")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            refuse(f"{where} must be an object whose role is one of {', '.join(sorted(ROLES))}.")
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    refuse(f"{where}.content holds something that is not text. This server answers text alone.")
        elif not isinstance(content, str | None):
            refuse(f"{where}.content must be a text.")
        if content is None and not message.get("tool_calls"):
            refuse(f"{where} has no content.")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(_is_call(call) for call in calls)):
            refuse(f"{where}.tool_calls must be a list of calls with a function and its arguments.")


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            return False
    return isinstance(arguments, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_id(token: str, vocabulary: int) -> bool:
    return token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocabulary


def _is_bias(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
