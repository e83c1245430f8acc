"""Data sets of the hub, served by a stub: fetched once at one commit, and not needed again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlxlora.data.hub_data import HubSource
from mlxlora.errors import DataError

FIRST, SECOND = "0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98"


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class Stub(ThreadingHTTPServer):
    """Serves one data set, `someone/rows`, at one commit; writes down what was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.commit = folder, FIRST
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        about = {"ETag": f'"{self.server.commit}-{path}"', "X-Repo-Commit": self.server.commit}
        files = sorted(self.server.folder.iterdir())
        if path.startswith("/api/datasets/someone/rows"):
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _hash(file)} for file in files
            ]
            here = {"id": "someone/rows", "sha": self.server.commit, "siblings": []}
            return self.answer(200, json.dumps(tree if "/tree/" in path else here).encode(), about)
        if path.startswith("/datasets/someone/rows/resolve/"):
            file = self.server.folder / path.rsplit("/", 1)[1]
            if file in files:
                return self.answer(200, file.read_bytes(), about)
            return self.answer(404, b"", {**about, "X-Error-Code": "EntryNotFound"})
        return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def played(folder: Path, tokenizer: Path) -> None:
    """What a user does in a week, in a process of its own: the hub's libraries read their settings when imported."""
    rows = folder / "rows"
    rows.mkdir()
    write(rows, 12)
    stub = Stub(rows)
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{stub.server_port}", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    os.environ.update(settings)
    from mlxlora.data import SamplesConfig, load
    from mlxlora.tokenizer import Tokenizer

    made = Tokenizer.load(tokenizer)
    said: dict[str, Any] = {}

    def run(step: str, name: str = "hub:someone/rows", **options: Any) -> None:
        stub.asked.clear()
        try:
            data = load(name, made, SamplesConfig(cache=folder / "cache", **options))
            said[step] = [len(data.train), len(data.valid or []), data.train.origin(0), len(stub.asked)]
        except DataError as error:
            said[step] = str(error)

    run("first")
    run("again")
    run("other options", max_length=64)
    run("no such", "hub:someone/nothing")
    write(rows, 13)
    stub.commit = SECOND
    run("moved on")
    run("pinned", f"hub:someone/rows#{FIRST[:8]}")
    stub.shutdown()
    stub.server_close()
    run("offline")
    run("offline, other options", max_length=32)
    run("offline, pinned", f"hub:someone/rows#{FIRST}", max_length=16)
    run("offline, never seen", "hub:someone/other")
    print(json.dumps(said))


def write(folder: Path, count: int) -> None:
    for name, number in (("train", count), ("validation", 2)):
        rows = [json.dumps({"prompt": f"question {i}", "completion": f"{name} {i}"}) for i in range(number)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))


def test_fetched_once_and_not_needed_again(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("datasets")
    code = "import sys, pathlib, tests.data.test_hub_data as t; t.played(*map(pathlib.Path, sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, str(tmp_path), str(model)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    one, two = (f"hub:someone/rows#{commit[:12]}:train:1" for commit in (FIRST, SECOND))
    assert said["first"][:3] == [12, 2, one]
    assert said["again"][:3] == [12, 2, one] and said["again"][3] <= 2  # one question: which commit?
    assert said["other options"][:3] == [12, 2, one] and said["other options"][3] <= 1
    assert "no such data set on the hub" in said["no such"]
    assert said["moved on"][:3] == [13, 2, two]
    assert said["pinned"] == [12, 2, one, 0]
    assert said["offline"] == said["offline, other options"] == [13, 2, two, 0]
    assert said["offline, pinned"] == [12, 2, one, 0]
    assert "the hub cannot be reached, and no earlier run" in said["offline, never seen"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hub:owner/name", ("owner/name", None, None)),
        ("hub:owner/name@small#v1", ("owner/name", "small", "v1")),
        ("hub:name#0123abc", ("name", None, "0123abc")),
    ],
)
def test_names(text: str, parts: tuple[str | None, ...]) -> None:
    source = HubSource.of(text)
    assert (source.path, source.config, source.revision) == parts


@pytest.mark.parametrize("text", ["hub:", "hub:/nowhere", "hub:../up", "hub:a/b/c", "hub:what ever", "hub:a..b/c"])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(DataError, match="neither a directory nor a name"):
        HubSource.of(text)


def test_a_directory_is_read_again_when_it_has_changed(
    tmp_path: Path, jsonl: Callable[..., Path], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    from mlxlora.data import SamplesConfig, load
    from mlxlora.tokenizer import Tokenizer

    tokenizer, config = Tokenizer.load(model), SamplesConfig(cache=tmp_path / "cache")
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(12)]
    jsonl(rows, "set/train.jsonl")
    jsonl(rows[:2], "set/validation.jsonl")
    name = f"hub:{tmp_path / 'set'}"
    first = load(name, tokenizer, config)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("tokenised again"))
        assert load(name, tokenizer, config).train.fingerprint == first.train.fingerprint
    jsonl(rows[:11], "set/train.jsonl")
    assert len(load(name, tokenizer, config).train) == 11
    with pytest.raises(DataError, match="no revisions"):
        load(f"{name}#main", tokenizer, config)
