"""Names on the hub, against a stub of it on this machine: only the needed files, revisions, and breaks in the line."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlxlora import hub
from mlxlora.errors import ModelError
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Stub(ThreadingHTTPServer):
    """Serves one model, `someone/tiny`; writes down what was asked; can hang up in the middle of a file."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory = directory
        self.asked: list[tuple[str, str, str]] = []
        self.hang_up_once = ""


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, span = self.path.split("?")[0], self.headers.get("Range", "")
        self.server.asked.append((self.command, path, span))
        if path.startswith("/api/models/someone/tiny"):
            revision = path.rsplit("/revision/", 1)[1] if "/revision/" in path else "main"
            if revision not in ("main", "v1", COMMIT):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = sorted(p for p in self.server.directory.rglob("*") if p.is_file())
            names = [{"rfilename": str(p.relative_to(self.server.directory))} for p in files]
            if "/tree/" in path:
                tree = [{"type": "file", "path": n["rfilename"], "size": 1, "oid": "x"} for n in names]
                return self.answer(200, json.dumps(tree).encode(), {})
            body = {"id": "someone/tiny", "modelId": "someone/tiny", "sha": COMMIT, "siblings": names}
            return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if path.startswith("/someone/tiny/resolve/"):
            name = path.split("/", 5)[5]
            return self.file(self.server.directory / name, span)
        return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})

    def file(self, path: Path, span: str) -> None:
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        body = content[start:]
        if span:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and self.server.hang_up_once == path.name:
            self.server.hang_up_once = ""
            self.answer(200, body, headers, sent=len(body) // 2)
            self.connection.close()
            return None
        return self.answer(206 if span else 200, body, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    directory = tiny.model_directory(tmp_path / "served", "llama")
    (directory / "original").mkdir()
    for name in (
        "consolidated.00.pth",
        "model.onnx",
        "picture.png",
        "original/params.bin",
        "pytorch_model.bin",
        "original/params.json",
        "original/model.safetensors",
    ):
        (directory / name).write_bytes(b"not wanted")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    server = Stub(directory)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def find(stub: Stub | None, home: Path, name: str, revision: str | None = None) -> subprocess.CompletedProcess[str]:
    """`hub.find` in a process of its own, because huggingface_hub reads its settings when it is imported."""
    port = stub.server_port if stub is not None else 9  # nobody listens there
    code = (
        "import sys\nfrom mlxlora import hub\nfrom mlxlora.errors import ModelError\n"
        "try: print(hub.find(sys.argv[1], revision=sys.argv[2] or None))\n"
        "except ModelError as error: sys.exit(f'refused: {error}')\n"
    )
    changed = {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    arguments = [sys.executable, "-c", code, name, revision or ""]
    return subprocess.run(arguments, env={**os.environ, **changed}, capture_output=True, text=True, timeout=120)


def test_fetches_only_what_a_model_needs_and_only_once(stub: Stub, tmp_path: Path) -> None:
    done = find(stub, tmp_path / "home", "someone/tiny", "v1")
    assert done.returncode == 0, done.stderr
    got = Path(done.stdout.strip())
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    extra = "additional_chat_templates/tools.jinja"
    assert {str(path.relative_to(got)) for path in got.rglob("*") if path.is_file()} == {*names, extra}
    for name in names:
        assert (got / name).read_bytes() == (stub.directory / name).read_bytes()
    stub.asked.clear()
    assert find(stub, tmp_path / "home", "someone/tiny", "v1").stdout == done.stdout
    assert not [path for method, path, _ in stub.asked if method == "GET" and "/resolve/" in path]
    offline = find(None, tmp_path / "home", "someone/tiny", "v1")
    assert offline.stdout == done.stdout, offline.stderr


def test_an_interrupted_download_goes_on(stub: Stub, tmp_path: Path) -> None:
    (stub.directory / "model.safetensors").write_bytes(os.urandom(24 << 20))  # it is kept in pieces of 10 MiB
    stub.hang_up_once = "model.safetensors"
    first = find(stub, tmp_path / "home", "someone/tiny")
    if first.returncode:  # huggingface_hub may also go on by itself, in the same call
        assert first.stderr.count("\n") <= 2 or "goes on" in first.stderr, first.stderr
        first = find(stub, tmp_path / "home", "someone/tiny")
    assert first.returncode == 0, first.stderr
    got = Path(first.stdout.strip()) / "model.safetensors"
    assert got.read_bytes() == (stub.directory / "model.safetensors").read_bytes()
    size = got.stat().st_size
    spans = [
        span for method, path, span in stub.asked if path.endswith("model.safetensors") and span and method == "GET"
    ]
    assert any(0 < int(span.removeprefix("bytes=").split("-")[0]) < size for span in spans), "it began again"


def test_torch_files_are_fetched_where_there_is_nothing_else(stub: Stub, tmp_path: Path) -> None:
    (stub.directory / "model.safetensors").unlink()
    got = Path(find(stub, tmp_path / "home", "someone/tiny").stdout.strip())
    assert (got / "pytorch_model.bin").is_file() and not (got / "original").exists()


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [("someone/absent", None, "no such model on the hub"), ("someone/tiny", "v9", "no revision 'v9'")],
)
def test_what_the_hub_does_not_have(stub: Stub, tmp_path: Path, name: str, revision: str | None, words: str) -> None:
    done = find(stub, tmp_path / "home", name, revision)
    assert done.returncode == 1 and words in done.stderr
    assert done.stderr.startswith("refused: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("reference", ["someone/else--evil.Evil", "../outside.Evil", "nothing.Evil"])
def test_a_tokenizer_by_its_hub_name_runs_no_code_from_elsewhere(stub: Stub, tmp_path: Path, reference: str) -> None:
    path = stub.directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [reference, None]}}))
    code = (
        "import sys\nfrom mlxlora.errors import ModelError\nfrom mlxlora.tokenizer import Tokenizer\n"
        "try: Tokenizer.load('someone/tiny', trust_remote_code=True)\n"
        "except ModelError as error: sys.exit(f'refused: {error}')\n"
    )
    home = {"HF_ENDPOINT": f"http://127.0.0.1:{stub.server_port}", "HF_HOME": str(tmp_path / "home")}
    env = {**os.environ, **home, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "refused" in done.stderr and "auto_map" in done.stderr, done.stderr
    assert not [path for _, path, _ in stub.asked if "someone/else" in path]


def test_no_network_is_said_in_one_line(tmp_path: Path) -> None:
    done = find(None, tmp_path / "home", "someone/tiny")
    assert done.returncode == 1 and "cannot be reached" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c", "../up", "what ever", "", "a/../b"])
def test_paths_never_go_to_the_hub(source: str) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        hub.find(source)


def test_files_and_local_revisions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        hub.find(tmp_path / "file")
    with pytest.raises(ModelError, match="revision"):
        hub.find(tmp_path, revision="main")
    assert hub.find(str(tmp_path)) == tmp_path
