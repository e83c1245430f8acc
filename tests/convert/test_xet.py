"""The hub's Xet storage, by its own client: what `upload` sends there, and that a model which lies there arrives.

The storage is a stub on this machine that keeps what it is sent (https://huggingface.co/docs/xet).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.convert.test_upload import Handler, Hub
from tests.hub_stub import Fetching, Repository, environment
from tests.patience import PATIENCE

pytest.importorskip("hf_xet", reason="pip install hf_xet")
FILE_HASH = "0123456789abcdef" * 4  # the storage's name for a file: ours is the only one to know what it means


class Storage(Hub):
    """A hub whose large files go to Xet storage."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = Storing
        self.bodies: list[bytes] = []
        self.oids: dict[str, str] = {}


class Storing(Handler):
    server: Storage

    def do_GET(self) -> None:
        if "/xet-write-token/" in self.path:
            self.note()
            return self.answer(token(self.server.address))
        if self.path.startswith("/cas"):
            return self.answer({}, 404)  # it has none of these chunks yet
        return super().do_GET()

    def do_POST(self) -> None:
        path = self.path
        if not path.startswith("/cas") and "/commit/" not in path and "telemetry" not in path:
            return super().do_POST()
        self.note()
        body = self.body()
        self.server.bodies.append(body)
        if "/v1/xorbs/" in path:
            self.server.stored[path.rpartition("/")[2]] = body
            return self.answer({"was_inserted": True})
        if "/commit/" in path:
            values = [json.loads(line)["value"] for line in body.splitlines()]
            self.server.oids = {value["path"]: value.get("oid", "") for value in values if "path" in value}
            return self.answer(
                {"success": True, "commitOid": "c" * 40, "commitUrl": f"{self.server.address}/a/b/commit/c"}
            )
        return self.answer({"result": 1}, 200 if path == "/cas/v1/shards" else 404)


def token(address: str) -> dict[str, object]:
    return {"accessToken": "x", "exp": int(time.time()) + 3600, "casUrl": f"{address}/cas"}


FIND = """
import sys
from mlxlora.errors import ModelError
from mlxlora.hub import find
try:
    find("someone/model")
except ModelError as error:
    sys.exit(f"said: {error}")
"""


def run(words: list[str], home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test", "HF_HOME": str(home), **more}
    left = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_XET"}
    command = [sys.executable, *words]
    return subprocess.run(command, env={**left, **settings}, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Storage, subprocess.CompletedProcess[str]]:
    root = tmp_path_factory.mktemp("secret-place")
    model = tiny.model_directory(root / "model", "llama")
    (model / "optimizer.safetensors").write_bytes(b"SECRET" * 100)
    with Storage() as hub:
        done = run(
            ["-m", "mlxlora", "upload", str(model), "--repo", "someone/model", "--endpoint", hub.address], root / "home"
        )
    return model, hub, done


def test_an_upload_sends_what_is_on_the_list_and_nothing_else(
    sent: tuple[Path, Storage, subprocess.CompletedProcess[str]],
) -> None:
    model, hub, done = sent
    assert done.returncode == 0, done.stderr
    assert hub.oids.keys() == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert hub.oids["model.safetensors"] == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert len(hub.stored) == 1 and hub.private == {"someone/model": True}
    everything = b"".join(hub.bodies)
    assert b"SECRET" not in everything and b"secret-place" not in everything


class Stored(Fetching):
    """A repository whose weights lie in Xet storage."""

    server: Warehouse

    def do_GET(self) -> None:
        path, hub = self.path.split("?")[0], self.server
        if "/xet-read-token/" in path:
            self.note()
            said = token(hub.address)
            if not hub.works:
                return self.answer({})
            return self.answer(
                said,
                X_Xet_Cas_Url=str(said["casUrl"]),
                X_Xet_Access_Token="x",
                X_Xet_Token_Expiration=str(said["exp"]),
            )
        if path.startswith("/xorb"):
            self.note()
            return self.answer(hub.xorb, 403 if hub.refuses else 200)
        if path.startswith("/cas/v1/reconstructions/"):
            self.note()
            chunks = {"start": 0, "end": count_chunks(hub.xorb)}
            size = (hub.folder / "model.safetensors").stat().st_size
            where = {"range": chunks, "url": f"{hub.address}/xorb", "url_range": {"start": 0, "end": len(hub.xorb) - 1}}
            terms = [{"hash": hub.named, "unpacked_length": size, "range": chunks}]
            return self.answer({"offset_into_first_range": 0, "terms": terms, "fetch_info": {hub.named: [where]}})
        if path.startswith("/cas"):
            return self.answer({}, 404)
        if path.endswith("/model.safetensors") and "/resolve/" in path:
            whole = hub.folder / "model.safetensors"
            headers: dict[str, Any] = {"ETag": '"weights"', "X-Repo-Commit": hub.commit, "X-Xet-Hash": FILE_HASH}
            place = f"{hub.address}/api/models/{hub.name}/xet-read-token/{hub.commit}"
            self.note()
            assert self.command == "HEAD", "the weights are not to come from here"
            length = str(whole.stat().st_size)
            return self.answer(b"", **headers, Link=f'<{place}>; rel="xet-auth"', X_Linked_Size=length)
        return super().do_GET()

    def do_POST(self) -> None:
        self.answer({}, 404)


class Warehouse(Repository):
    def __init__(self, folder: Path, name: str, named: str, xorb: bytes) -> None:
        super().__init__(folder, name)
        self.RequestHandlerClass = Stored
        self.named, self.xorb, self.works, self.refuses = named, xorb, True, False


def count_chunks(xorb: bytes) -> int:
    """Chunks of a xorb: each has a header of 8 bytes, with its length in bytes 1 to 3."""
    at = found = 0
    while at < len(xorb) and xorb[at : at + 7] != b"XETBLOB":
        at += 8 + int.from_bytes(xorb[at + 1 : at + 4], "little")
        found += 1
    return found


def test_a_model_that_lies_there_arrives_or_it_is_said_why(
    sent: tuple[Path, Storage, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    model, hub, _ = sent
    ((named, xorb),) = hub.stored.items()
    (model / "optimizer.safetensors").unlink(missing_ok=True)
    with Warehouse(model, "someone/model", named, xorb) as there:
        settings = {key: value for key, value in environment(there.address, tmp_path).items() if "XET" not in key}
        there.works = False
        failed = run(["-c", FIND], tmp_path, **settings)
        there.works = there.refuses = True
        refused = run(["-c", FIND], tmp_path, HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1", **settings)
        asked = there.asked.count(("GET", "/xorb"))
        there.refuses = False
        done = run(["-c", FIND], tmp_path, **settings)
    assert failed.returncode == 1 and failed.stderr.startswith("said: someone/model could not be fetched: ")
    assert refused.returncode == 1 and "403 Forbidden" in refused.stderr and asked == 2
    assert done.returncode == 0, done.stderr
    assert there.asked.count(("GET", "/xorb")) > asked
    found = list((tmp_path / "hub").glob("models--*/snapshots/*/model.safetensors"))
    assert len(found) == 1 and found[0].read_bytes() == (model / "model.safetensors").read_bytes()
