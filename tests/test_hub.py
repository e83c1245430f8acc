"""Names on the hub, against a stub of it on this machine: only the needed files, revisions, and breaks in the line."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxlora import hub
from mlxlora.errors import ModelError
from tests import tiny
from tests.hub_stub import Repository, environment
from tests.patience import PATIENCE


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Repository]:
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
    with Repository(directory, "someone/tiny") as served:
        yield served


def find(
    stub: Repository | None, home: Path, name: str, revision: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`hub.find` in a process of its own, because huggingface_hub reads its settings when it is imported."""
    address = "http://127.0.0.1:9" if stub is None else stub.address  # nobody listens at port 9
    code = (
        "import sys\nfrom mlxlora import hub\nfrom mlxlora.errors import ModelError\n"
        "try: print(hub.find(sys.argv[1], revision=sys.argv[2] or None))\n"
        "except ModelError as error: sys.exit(f'refused: {error}')\n"
    )
    arguments = [sys.executable, "-c", code, name, revision or ""]
    return subprocess.run(
        arguments, env={**os.environ, **environment(address, home)}, capture_output=True, text=True, timeout=PATIENCE
    )


def test_fetches_only_what_a_model_needs_and_only_once(stub: Repository, tmp_path: Path) -> None:
    done = find(stub, tmp_path / "home", "someone/tiny", "v1")
    assert done.returncode == 0, done.stderr
    got = Path(done.stdout.strip())
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    extra = "additional_chat_templates/tools.jinja"
    assert {str(path.relative_to(got)) for path in got.rglob("*") if path.is_file()} == {*names, extra}
    for name in names:
        assert (got / name).read_bytes() == (stub.folder / name).read_bytes()
    stub.asked.clear()
    assert find(stub, tmp_path / "home", "someone/tiny", "v1").stdout == done.stdout
    assert not [path for method, path in stub.asked if method == "GET" and "/resolve/" in path]
    offline = find(None, tmp_path / "home", "someone/tiny", "v1")
    assert offline.stdout == done.stdout, offline.stderr


def test_an_interrupted_download_goes_on(stub: Repository, tmp_path: Path) -> None:
    (stub.folder / "model.safetensors").write_bytes(os.urandom(24 << 20))  # it is kept in pieces of 10 MiB
    stub.hang_up_once = "model.safetensors"
    first = find(stub, tmp_path / "home", "someone/tiny")
    if first.returncode:  # huggingface_hub may also go on by itself, in the same call
        assert first.stderr.count("\n") <= 2 or "goes on" in first.stderr, first.stderr
        first = find(stub, tmp_path / "home", "someone/tiny")
    assert first.returncode == 0, first.stderr
    got = Path(first.stdout.strip()) / "model.safetensors"
    assert got.read_bytes() == (stub.folder / "model.safetensors").read_bytes()
    size = got.stat().st_size
    assert any(0 < start < size for name, start in stub.spans if name == got.name), "it began again"


def test_torch_files_are_fetched_where_there_is_nothing_else(stub: Repository, tmp_path: Path) -> None:
    (stub.folder / "model.safetensors").unlink()
    got = Path(find(stub, tmp_path / "home", "someone/tiny").stdout.strip())
    assert (got / "pytorch_model.bin").is_file() and not (got / "original").exists()


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [("someone/absent", None, "no such model on the hub"), ("someone/tiny", "v9", "no revision 'v9'")],
)
def test_what_the_hub_does_not_have(
    stub: Repository, tmp_path: Path, name: str, revision: str | None, words: str
) -> None:
    done = find(stub, tmp_path / "home", name, revision)
    assert done.returncode == 1 and words in done.stderr
    assert done.stderr.startswith("refused: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("reference", ["someone/else--evil.Evil", "../outside.Evil", "nothing.Evil"])
def test_a_tokenizer_by_its_hub_name_runs_no_code_from_elsewhere(
    stub: Repository, tmp_path: Path, reference: str
) -> None:
    path = stub.folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [reference, None]}}))
    code = (
        "import sys\nfrom mlxlora.errors import ModelError\nfrom mlxlora.tokenizer import Tokenizer\n"
        "try: Tokenizer.load('someone/tiny', trust_remote_code=True)\n"
        "except ModelError as error: sys.exit(f'refused: {error}')\n"
    )
    env = {**os.environ, **environment(stub.address, tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "refused" in done.stderr and "auto_map" in done.stderr, done.stderr
    assert not [path for _, path in stub.asked if "someone/else" in path]


def test_no_network_is_said_in_one_line(tmp_path: Path) -> None:
    done = find(None, tmp_path / "home", "someone/tiny")
    assert done.returncode == 1 and "cannot be reached" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c", "../up", "what ever", "", "a/../b"])
def test_paths_never_go_to_the_hub(source: str) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        hub.find(source)


@pytest.mark.parametrize("name", ["models/bse", "./models/bse"])
def test_a_mistyped_directory_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"Did you mean 'base'"):
        hub.find(name)


def test_files_and_local_revisions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        hub.find(tmp_path / "file")
    with pytest.raises(ModelError, match="revision"):
        hub.find(tmp_path, revision="main")
    assert hub.find(str(tmp_path)) == tmp_path


def test_a_loaded_model_is_no_name() -> None:
    with pytest.raises(ModelError, match="by its directory or its name on the hub, not given as dict"):
        hub.find({})  # type: ignore[arg-type]
