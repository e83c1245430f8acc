"""Data sets of the hub, served by a stub: fetched once at one commit, and not needed again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxlora.data.hub_data import HubSource
from mlxlora.errors import DataError
from tests.hub_stub import COMMIT, Repository, environment
from tests.patience import PATIENCE

FIRST, SECOND = COMMIT, "fedcba9876543210fedcba9876543210fedcba98"


def played(folder: Path, tokenizer: Path) -> None:
    """What a user does in a week, in a process of its own: the hub's libraries read their settings when imported."""
    rows = folder / "rows"
    rows.mkdir()
    write(rows, 12)
    stub = Repository(rows, "someone/rows", "datasets")
    os.environ.update(environment(stub.address, folder / "home"))
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

    with stub:
        run("first")
        run("again")
        run("other options", max_length=64)
        run("no such", "hub:someone/nothing")
        write(rows, 13)
        stub.commit = SECOND
        run("moved on")
        run("pinned", f"hub:someone/rows#{FIRST[:8]}")
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
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE)
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
