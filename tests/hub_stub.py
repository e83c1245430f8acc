"""A stub of the hub on this machine, for what is fetched from it and what is sent to it."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Stub(ThreadingHTTPServer):
    """Answers while a `with` block lasts; `asked` holds the method and the path of every request."""

    def __init__(self, handler: type[Answering]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.asked: list[tuple[str, str]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Answering(BaseHTTPRequestHandler):
    """One answer after the other."""

    def log_message(self, *_: Any) -> None:
        pass

    def note(self) -> str:
        """Write down what is asked; its path."""
        path = self.path.split("?")[0]
        assert isinstance(self.server, Stub)
        self.server.asked.append((self.command, path))
        return path

    def answer(self, body: Any, status: int = 200, *, sent: int | None = None, **headers: str) -> None:
        """Bytes as they are, all else as JSON; `sent` of the bytes, where the line is to break."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])


class Repository(Stub):
    """One repository to fetch from, the files of a folder: as `main`, as `v1`, or by its commit.

    spans:         of each request for a part of a file: its path and the first byte
    hang_up_once:  the name of a file in the middle of which the line breaks, the next time
    """

    def __init__(self, folder: Path, name: str, kind: str = "models") -> None:
        super().__init__(Fetching)
        self.folder, self.name, self.kind, self.commit = folder, name, kind, COMMIT
        self.spans: list[tuple[str, int]] = []
        self.hang_up_once = ""


def environment(address: str, home: Path) -> dict[str, str]:
    """The environment of a process that is to take `address` for the hub, and to keep in `home` what it fetches."""
    return {
        "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip


class Fetching(Answering):
    server: Repository

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, served = self.note(), self.server
        about = f"/api/{served.kind}/{served.name}"
        files = f"/{'' if served.kind == 'models' else served.kind + '/'}{served.name}/resolve/"
        if path == about or path.startswith(about + "/"):
            return self.describe(path)
        if path.startswith(files):
            return self.file(served.folder / path.removeprefix(files).split("/", 1)[1])
        return self.answer({}, 401, X_Error_Code="RepoNotFound")

    def describe(self, path: str) -> None:
        served = self.server
        revision = path.rsplit("/revision/", 1)[1] if "/revision/" in path else "main"
        if revision not in ("main", "v1", served.commit):
            return self.answer({}, 404, X_Error_Code="RevisionNotFound")
        files = sorted(path for path in served.folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(served.folder)) for path in files]
        if "/tree/" in path:
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(name.encode()).hexdigest(),
                }
                for name, file in zip(names, files, strict=True)
            ]
            return self.answer(tree)
        return self.answer(
            {"id": served.name, "sha": served.commit, "siblings": [{"rfilename": name} for name in names]}
        )

    def file(self, path: Path) -> None:
        served = self.server
        if not path.is_file():
            return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=served.commit)
        whole, span = path.read_bytes(), self.headers.get("Range", "")
        start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        headers: dict[str, Any] = {
            "ETag": f'"{hashlib.sha256(whole).hexdigest()}"', "X-Repo-Commit": served.commit, "Accept-Ranges": "bytes",
        }  # fmt: skip
        if span and self.command == "GET":
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
            served.spans.append((path.name, start))
        body = whole[start:]
        if self.command == "GET" and served.hang_up_once == path.name:
            served.hang_up_once = ""
            self.answer(body, sent=len(body) // 2, **headers)
            self.connection.close()
            return None
        return self.answer(body, 206 if span else 200, **headers)
