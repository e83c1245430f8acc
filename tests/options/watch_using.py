"""What the verbs that use and write models did, as views."""

from __future__ import annotations

import hashlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxlora.files import plain
from mlxlora.serve import Server
from tests.options.calls import Call, Stop, Views
from tests.options.place import Place, listed, tensors
from tests.patience import PATIENCE

# ---- a model that answers -------------------------------------------------------------------------------------------


def rounded(value: Any) -> Any:
    """Numbers to four digits: sums are made in another order when batches change."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def result(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """What a verb returns, but for times and places, and what it writes."""
    found = rounded(plain(function(**arguments)))
    views = {name: value for name, value in found.items() if name not in ("tokens_per_second", "peak_memory", "out")}
    return views | {"written": isinstance(arguments.get("out"), Path) and arguments["out"].exists()}


def compare(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """What `compare` says of the rows."""
    asked: list[Any] = []
    patch.setattr(sys.modules["mlxlora.compare"], "refuse_missing", lambda: None)
    patch.setattr(sys.modules["mlxlora.compare"], "differences", lambda *_: {})
    patch.setattr(
        sys.modules["mlxlora.compare"], "measure", lambda model, tasks, *, limit: asked.append((tasks, limit))
    )
    found = function(**arguments)
    return {
        "rows": found.rows, "candidates": [*found.differences], "metrics": [*next(iter(found.differences.values()))],
        "losses": [one["loss"] for one in found.differences.values()], "data": found.data, "harness": asked,
        "answers": [row.answers for row in found.samples],
        "written": bool(arguments["out"] and arguments["out"].exists()),
    }  # fmt: skip


def answers(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """What `compare` lets the model answer; the losses, which take longer, are left out."""
    patch.setattr(sys.modules["mlxlora.compare"], "row_losses", lambda model, data, chosen: [0.0] * len(chosen))
    return {"answers": [row.answers for row in function(**arguments).samples]}


def chat(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """A talk of two questions."""
    patch.setattr(sys, "stdin", io.StringIO("What is one?\nAnd two?\n"))
    patch.setattr(sys, "stdout", io.StringIO())
    found = function(**arguments)
    said = [message["content"] for message in found.messages if message["role"] == "assistant"]
    return {"said": said, "system": [one["content"] for one in found.messages if one["role"] == "system"]}


def serve(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """What a server answers to a question, with a token and from a page where it was started with them."""
    import http.client
    import json
    import urllib.parse

    answers: Views = {}
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6})

    def wait(self: Any) -> None:
        place_ = urllib.parse.urlparse(self.address)
        answers["host"] = place_.hostname
        answers["names"] = self.rules.names()
        for who, more in {
            "anybody": {},
            "a page": {"Origin": "http://localhost:3000"},
            "the owner": {"Authorization": "Bearer 0123456789abcdef"},
        }.items():
            line = http.client.HTTPConnection(place_.hostname or "", place_.port, timeout=PATIENCE)
            line.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json", **more})
            answered = line.getresponse()
            said = json.loads(answered.read())
            answers[who] = said["choices"][0]["message"]["content"] if answered.status == 200 else answered.status
            line.close()

    patch.setattr(Server, "wait", wait)
    patch.setattr(sys, "stderr", io.StringIO())
    function(**arguments)
    return answers


def binds(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """Where a server would listen."""
    asked: list[Any] = []

    def server(model: Any, **options: Any) -> None:
        asked.append(options)
        raise Stop

    patch.setattr(sys.modules["mlxlora.serve"], "load", lambda *_, **__: None)
    patch.setattr(sys.modules["mlxlora.serve"], "Server", server)
    with pytest.raises(Stop):
        function(**arguments)
    return {"asked": asked}


# ---- what writes models and adapters --------------------------------------------------------------------------------


def writes(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """The files that appear: their names, and what each holds but for the places of this test."""
    found = function(**arguments)
    out = Path(arguments["out"])
    files = [out] if out.is_file() else [out / name for name in listed(out)]
    held = {
        "weights" if path.suffix in (".safetensors", ".gguf") else path.name: digest(path, place)
        for path in files
        if path.name not in ("manifest.json", "model.safetensors.index.json")
    }
    views = {"files": [path.name for path in files if path != out], **held}
    for name in ("check", "difference", "reference", "divergence"):
        if hasattr(found, name):
            views["checked"] = getattr(found, name) is not None or views.get("checked", False)
    return views


def checks(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """Whether what was written is read back before it is published."""
    asked: list[str] = []
    for reader in ("mlxlora.fusing.writing.read_back", "mlxlora_convert.export._read_back"):
        patch.setattr(reader, lambda *_, **__: asked.append("read back"))
    function(**arguments)
    return {"asked": asked}


def digest(path: Path, place: Place) -> Any:
    """What a file holds."""
    if path.suffix == ".safetensors":
        return {name: hashlib.sha256(value).hexdigest() for name, value in tensors(path).items()}
    raw = path.read_bytes()
    if path.suffix == ".gguf":
        return hashlib.sha256(raw).hexdigest()
    return re.sub(re.escape(str(place.folder)) + r"[^\s\"]*", "PATH", raw.decode())


def uploads(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """What would be sent where."""
    sent: list[Any] = []

    def send(repo: str, staged: Any, **options: Any) -> tuple[str, str]:
        sent.append((repo, options))
        return "", ""

    patch.setattr("mlxlora_convert.upload._send", send)
    found = function(**arguments)
    return {
        "sent": sent, "card": found.card, "repo": found.repo, "private": found.private,
        "files": [(one.name, one.bytes) for one in found.files],
    }  # fmt: skip


def reports(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """The page, and where it lies."""
    found = function(**arguments)
    (page,) = [value for value in vars(found).values() if isinstance(value, Path)]
    return {"at": page.name, "page": len(page.read_text())}


def demo(place: Place, function: Call, arguments: Views, patch: pytest.MonkeyPatch) -> Views:
    """What the demo would go through."""
    asked: Views = {}

    class Steps:
        def __init__(self, out: Path, source: Path, questions: Any, seed: int, *_: Any) -> None:
            asked.update(out=out.exists(), questions=list(questions), seed=seed)

        def run(self, training: Any, start: float) -> None:
            asked["training"] = list(training)
            raise Stop

    patch.setattr("mlxlora.demo.run._Steps", Steps)
    with pytest.raises(Stop):
        function(**arguments)
    return asked | {"questions": list(map(str, asked["questions"])), "training": list(map(str, asked["training"]))}
