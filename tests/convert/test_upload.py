"""Uploads, against a stub of the hub on this machine: what is sent, what never is, and what a refusal says."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

from mlxlora.adapters import AdapterConfig
from mlxlora.cli import main
from mlxlora.errors import ConfigError, FormatError, InputError, MlxLoraError
from mlxlora.finetune import finetune
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Event, Notice
from mlxlora_convert.export import export
from mlxlora_convert.gguf_file import export_gguf
from mlxlora_convert.upload import upload
from tests import tiny
from tests.hub_stub import Answering, Stub


class Hub(Stub):
    """The part of the hub that an upload talks to: make a repository, large files to a store, one commit."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.private: dict[str, bool] = {}
        self.committed: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.refuse = False


class Handler(Answering):
    server: Hub

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            whole = b""
            while size := int(self.rfile.readline(), 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        path = self.note()
        if self.server.refuse:
            return self.answer({"error": "you may not"}, 403)
        repo = path.removeprefix("/api/models/").split("/revision")[0]
        self.answer({"id": repo, "private": self.server.private.get(repo, True), "siblings": [], "sha": "0" * 40})

    def do_PUT(self) -> None:
        self.server.stored[self.note().rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        hub, path = self.server, self.note()
        hub.tokens.add(str(self.headers.get("Authorization")))
        content = self.body()
        if hub.refuse:
            self.answer({"error": "you may not"}, 403)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            if repo in hub.private:
                self.answer({"error": "exists", "url": f"{hub.address}/{repo}"}, 409)
            else:
                hub.private[repo] = asked.get("private", asked.get("visibility") == "private")
                self.answer({"url": f"{hub.address}/{repo}"})
        elif "/preupload/" in path:
            names = [one["path"] for one in json.loads(content)["files"]]
            modes = ["lfs" if name.endswith((".safetensors", ".gguf")) else "regular" for name in names]
            chosen = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for name, mode in zip(names, modes, strict=True)
            ]
            self.answer({"files": chosen})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.address}/store/{one['oid']}"}}}
                for one in json.loads(content)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.committed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.committed[value["path"]] = hub.stored[value["oid"]]
            self.answer(
                {
                    "success": True,
                    "commitOid": "c" * 40,
                    "commitUrl": f"{hub.address}/{path.split('/')[3]}/{path.split('/')[4]}/commit/c",
                }
            )
        else:
            self.answer({"error": path}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short real run, in a folder whose name must not travel."""
    root = tmp_path_factory.mktemp("secret-place")
    model = tiny.model_directory(root / "tiny-llama", "llama")
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(24)
    ]
    (root / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = TrainingConfig(steps=3)
    finetune(str(model), [str(root / "chats.jsonl")], root / "run", training=settings, adapter=AdapterConfig(rank=4))
    return root / "run"


def test_a_run_is_sent_private_with_a_card_of_what_was_done(hub: Hub, run: Path) -> None:
    told: list[Event] = []
    result = upload(
        run, "someone/tuned", base="org/tiny-llama", license="mit", endpoint=hub.address, on_event=told.append
    )
    assert hub.private == {"someone/tuned": True} and result.private and result.commit == "c" * 40
    assert hub.tokens == {"Bearer hf_test"}
    names = ["README.md", "adapter_config.json", "adapters.safetensors", "manifest.json"]
    assert sorted(hub.committed) == names == sorted(one.name for one in result.files)
    for name in names[1:]:
        assert hub.committed[name] == (run / "best" / name).read_bytes()
    card = hub.committed["README.md"].decode()
    for line in (
        "base_model: org/tiny-llama", "license: mit", "library_name: mlx", "| adapter.rank | `4` |",
        "| Validation loss before training |", "| Tokens trained on |", "| Samples | 23 |", "someone/tuned",
    ):  # fmt: skip
        assert line in card, line
    everything = b"".join(hub.committed.values())
    assert str(run.parent).encode() not in everything and b"secret-place" not in everything
    messages = [event.message for event in told if isinstance(event, Notice)]
    assert messages[0] == "sending to someone/tuned (private):" and any("adapters.safetensors" in m for m in messages)


def test_the_list_is_told_before_anything_is_sent(hub: Hub, run: Path) -> None:
    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload(run, "someone/tuned", endpoint=hub.address, on_event=stop)
    assert hub.asked == []
    result = upload(run, "someone/tuned", endpoint=hub.address, dry_run=True)
    assert hub.asked == [] and result.url == "" and "dry run" in str(result)


@pytest.mark.parametrize("endpoint", ["nosuch", "", "hub.example", "ftp://hub.example", "https://", "https:// x"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_is_no_address_is_refused_before_anything_else(endpoint: str, dry_run: bool, hub: Hub, run: Path) -> None:
    with pytest.raises(ConfigError, match=f"--endpoint '{endpoint}' must be the address"):
        upload(run, "someone/tuned", endpoint=endpoint, dry_run=dry_run)
    assert hub.asked == []


def test_only_files_of_the_list_go(hub: Hub, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in (run / "adapter").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / ".env").write_text("HF_TOKEN=hf_secret")
    (folder / "notes.txt").write_text("mine")
    (folder / "optimizer.safetensors").write_bytes(b"x")
    (folder / "data").mkdir()
    result = upload(folder, "someone/tuned", endpoint=hub.address)
    assert result.left_out == (".env", "data/", "notes.txt", "optimizer.safetensors")
    assert not hub.committed.keys() & {".env", "notes.txt", "optimizer.safetensors"}


def test_links_out_of_the_directory_are_not_sent(hub: Hub, run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    (tmp_path / "key").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "key")
    with pytest.raises(InputError, match=r"LICENSE: is a link to .*key"):
        upload(folder, "someone/tuned", endpoint=hub.address)
    assert not hub.committed


def test_a_file_that_is_named_goes_alone(hub: Hub, run: Path, tmp_path: Path) -> None:
    """What `export --to gguf` says comes next must not send what lies beside its result."""
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]
    (tmp_path / "private.gguf").write_bytes(b"not to be sent")
    written = export(model, "gguf", tmp_path / "mine.gguf", check=False)
    said = shlex.split(str(written).rpartition("next: ")[2])
    assert said == ["mlxlora", "upload", str(tmp_path / "mine.gguf"), "--repo", "OWNER/NAME"]
    result = upload(Path(said[2]), "someone/model", endpoint=hub.address)
    assert hub.committed.keys() == {"mine.gguf", "README.md"} and result.left_out == ()
    assert hub.committed["mine.gguf"] == (tmp_path / "mine.gguf").read_bytes()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="or a GGUF file"):
        upload(tmp_path / "notes.txt", "someone/model", endpoint=hub.address)


def test_an_existing_public_repository_is_refused_unless_meant(hub: Hub, run: Path) -> None:
    hub.private["someone/tuned"] = False
    with pytest.raises(InputError, match="everybody can read it"):
        upload(run, "someone/tuned", endpoint=hub.address)
    assert not hub.committed
    upload(run, "someone/tuned", private=False, endpoint=hub.address)
    assert hub.committed


def test_traces_of_this_machine_stop_it(hub: Hub, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    export(str(run.parent / "tiny-llama"), "peft", folder, adapter=[str(run)], check=False)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/Users/jo/models/x"}))
    with pytest.raises(InputError, match=r"adapter_config\.json: holds '/Users/jo'"):
        upload(folder, "someone/tuned", endpoint=hub.address)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
@pytest.mark.parametrize("keep", [0, 20, -40])
def test_damaged_weights_stay_here(name: str, keep: int, hub: Hub, tmp_path: Path) -> None:
    model = tiny.model_directory(tmp_path / "model", "llama")
    if name.endswith(".gguf"):
        export_gguf(model, tmp_path / "model.gguf", type="q8_0")
    damaged = (tmp_path if name.endswith(".gguf") else model) / name
    content = damaged.read_bytes()
    damaged.write_bytes(content[:keep])
    for source in {damaged.parent, damaged} if name.endswith(".gguf") else {model}:
        with pytest.raises(FormatError):
            upload(source, "someone/model", endpoint=hub.address)
    assert hub.asked == []


def test_a_model_goes_without_the_place_it_came_from(hub: Hub, run: Path, tmp_path: Path) -> None:
    model = tiny.model_directory(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/jo/llama"}))
    upload(model, "someone/model", endpoint=hub.address)
    assert "_name_or_path" not in json.loads(hub.committed["config.json"])
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= hub.committed.keys()
    stored = hashlib.sha256(hub.committed["model.safetensors"]).hexdigest()
    assert stored == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def test_refusals(hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="must be OWNER/NAME"):
        upload(run, "tuned", endpoint=hub.address)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        upload(tmp_path / "empty", "someone/tuned", endpoint=hub.address)
    with pytest.raises(InputError, match="does not exist"):
        upload(tmp_path / "nothing", "someone/tuned", endpoint=hub.address)
    hub.refuse = True
    with pytest.raises(MlxLoraError, match=r"hub refused someone/tuned: .*hf auth login"):
        upload(run, "someone/tuned", endpoint=hub.address)
    assert main(["upload", str(run), "--repo", "someone/tuned", "--dry_run", "--endpoint", hub.address]) == 0
    said = capsys.readouterr()
    assert "someone/tuned (private), not sent: dry run" in said.out and "adapters.safetensors" in said.out
    assert "sending" not in said.err


def test_a_card_of_ones_own(hub: Hub, run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("# Mine\n")
    upload(run, "someone/tuned", card_file=tmp_path / "mine.md", endpoint=hub.address)
    assert hub.committed["README.md"] == b"# Mine\n"
