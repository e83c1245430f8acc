"""With local paths no connection is opened: every attempt of a process is traced, hub access being allowed."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import tiny
from tests.faults import session

ROOT = Path(__file__).parents[2]
TRACE = """
import json, sys
tried = []
def hook(event, arguments):
    watched = ("connect", "getaddrinfo", "gethostbyname", "sendto", "sendmsg")
    if event in {f"socket.{name}" for name in watched} | {"http.client.connect"}:
        if not str(arguments[-1]).startswith("/"):  # a socket in the file system is no network
            tried.append([event, str(arguments[1:])])
sys.addaudithook(hook)
import socket
try:  # the trace sees what it looks for
    socket.create_connection(("127.0.0.1", 9), timeout=0.1)
except OSError:
    pass
seen, tried[:] = bool(tried), []
from mlxlora import cli
codes = [cli.main(words) for words in json.loads(sys.argv[1])]
print(json.dumps({"seen": seen, "codes": codes, "tried": tried}))
"""


def test_no_connection_with_local_paths(tmp_path: Path) -> None:
    model, data = tiny.model_directory(tmp_path / "model", "qwen3"), session.rows(tmp_path / "data.jsonl", 12)
    base = ["--model", str(model)]
    tuned = ["--adapter", str(tmp_path / "run")]
    words = "--samples.validation_split 0.3 --search.learning_rates 0.001 --search.ranks 2 --search.targets attention"
    search = [*words.split(), "--search.steps", "1"]
    commands = [
        ["convert", *base, "--out", str(tmp_path / "converted")],
        session.flags(model, data, tmp_path / "run", {"training.steps": 2}),
        ["eval", *base, "--data", str(data), "--adapter", str(tmp_path / "run")],
        ["generate", *base, "--prompt", "Hi", "--sampling.max_tokens", "2", "--adapter", str(tmp_path / "run")],
        ["compare", *base, *tuned, "--data", str(data), "--metrics", "exact", "--sampling.max_tokens", "2"],
        ["plan", *base, "--data", str(data), "--training.checkpoint_blocks", "inputs"],
        ["tune", *base, "--data", str(data), "--out", str(tmp_path / "search"), *search],
        ["data", "check", str(data), *base],
        ["data", "convert", str(data), "--out", str(tmp_path / "rows.jsonl")],
        ["report", str(tmp_path / "run")],
        ["fuse", *base, *tuned, "--out", str(tmp_path / "fused")],
        ["merge", str(tmp_path / "run"), str(tmp_path / "run=0.5"), "--out", str(tmp_path / "merged")],
        ["export", *base, "--to", "hf", "--check", "true", "--out", str(tmp_path / "hf")],
        ["export", *base, *tuned, "--to", "peft", "--check", "true", "--out", str(tmp_path / "peft")],
        ["import", str(tmp_path / "peft"), *base, "--out", str(tmp_path / "back")],
        ["upload", str(tmp_path / "run"), "--repo", "me/it", "--dry_run"],
        ["doctor"],
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": f"{ROOT}:{ROOT / 'convert'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRACE, json.dumps(commands)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seen"], "the trace is blind"
    assert found["codes"] == [0] * len(commands), done.stderr
    assert found["tried"] == []
    print(f"{len(commands)} commands on local paths with the hub allowed: no connection tried")
