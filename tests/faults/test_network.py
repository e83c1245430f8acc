"""With local paths no connection is opened and no name looked up, hub access being allowed: every attempt of a process,
and of those that it starts, is noted."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mlxlora.cli import VERBS
from tests import tiny
from tests.faults import session

ROOT = Path(__file__).parents[2]
# read by every interpreter that starts with this file's folder on its path
NOTE = """
import os, sys
WATCHED = ("connect", "getaddrinfo", "gethostbyname", "gethostbyaddr", "sendto", "sendmsg")
EVENTS = {f"socket.{name}" for name in WATCHED} | {"http.client.connect"}
def note(event, arguments):
    if event in EVENTS and not str(arguments[-1]).startswith("/"):  # a socket in the file system is no network
        with open(os.environ["NOTES"], "a") as notes:
            print(os.environ.get("COMMAND", "none"), event, *map(str, arguments), file=notes)
sys.addaudithook(note)
"""
COMMANDS = """
import io, json, os, socket, subprocess, sys, urllib.request
try:  # what shall be seen is seen, here and in a process that this one starts
    socket.create_connection(("127.0.0.1", 9), timeout=0.1)
except OSError:
    pass
subprocess.run([sys.executable, "-c", "import socket; socket.getaddrinfo('127.0.0.1', 9)"])
from mlxlora import cli
from mlxlora.serve import Server
import mlxlora.plan
sys.modules["mlxlora.plan"].CONTEXTS = (32, 64)  # of its table: the other rows need longer steps, not other code
def ask(server):
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}).encode()
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.address + "/v1/chat/completions", body, kind)
    assert json.load(urllib.request.urlopen(request, timeout=600))["choices"]
Server.wait = ask
sys.stdin = io.StringIO("Hi\\n/compare What?\\n/exit\\n")
codes = []
for words in json.loads(sys.argv[1]):
    os.environ["COMMAND"] = words[0]
    codes.append(cli.main(words))
print(json.dumps(codes))
"""


def commands(folder: Path) -> list[list[str]]:
    """Every verb, on files in `folder`."""
    model, data = tiny.model_directory(folder / "model", "qwen3"), session.rows(folder / "data.jsonl", 12)
    base = ["--model", str(model)]
    rows = [*base, "--data", str(data)]
    tuned = [*base, "--adapter", str(folder / "run")]
    short, inputs = ["--sampling.max_tokens", "2"], ["--training.checkpoint_blocks", "inputs"]
    quantize = ["--quantize.bits", "4", "--quantize.group_size", "32"]
    search = "--samples.validation_split 0.3 --search.learning_rates 0.001 --search.ranks 2 --search.targets attention"

    def to(name: str) -> list[str]:
        return ["--out", str(folder / name)]

    return [
        ["demo", "--questions", "1", "--samples", "20", *to("demo")],
        ["convert", *base, *to("converted")],
        ["convert", *base, *quantize, *to("quantized")],
        session.flags(model, data, folder / "run", {"training.steps": 2, "training.checkpoint_blocks": "inputs"}),
        ["eval", *tuned, "--data", str(data)],
        ["generate", *tuned, "--prompt", "Hi", *short],
        ["chat", *tuned, *short],
        ["serve", *tuned, "--port", "0"],
        ["compare", *tuned, "--data", str(data), "--metrics", "exact", *short],
        ["plan", *rows, *inputs],
        ["tune", *rows, *to("search"), *search.split(), "--search.steps", "1", *inputs],
        ["data", "check", str(data), *base],
        ["data", "convert", str(data), *to("rows.jsonl")],
        ["report", str(folder / "run")],
        ["fuse", *tuned, *to("fused")],
        ["merge", str(folder / "run"), str(folder / "run=0.5"), *to("merged")],
        ["export", *base, "--to", "hf", "--check", "true", *to("hf")],
        ["export", *base, "--to", "gguf", *to("model.gguf")],
        ["export", *tuned, "--to", "peft", "--check", "true", *to("peft")],
        ["import", str(folder / "peft"), *base, *to("back")],
        ["import", str(folder / "model.gguf"), *to("model-back")],
        ["upload", str(folder / "run"), "--repo", "me/it", "--dry_run"],
        ["doctor"],
        ["completion", "zsh"],
    ]


def test_no_connection_with_local_paths(tmp_path: Path) -> None:
    wanted = commands(tmp_path)
    left_out = [verb for verb in VERBS if not any(words[: len(verb.split())] == verb.split() for words in wanted)]
    assert not left_out, left_out
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOTE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "NOTES": str(tmp_path / "notes")}
    environment["PYTHONPATH"] = f"{tmp_path / 'site'}:{ROOT}:{ROOT / 'convert'}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMANDS, json.dumps(wanted)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0] * len(wanted), done.stderr
    tried = (tmp_path / "notes").read_text().splitlines()
    assert {line.split()[1] for line in tried if line.startswith("none ")} >= {"socket.connect", "socket.getaddrinfo"}
    # serving is being asked, here by the same process: at the loopback, and nowhere else
    own = [line for line in tried if line.startswith("serve ")]
    assert own and all("127.0.0.1" in line and "gethostby" not in line for line in own), own
    tried = [line for line in tried if not line.startswith(("none ", "serve "))]
    assert not tried, tried
    print(f"{len(codes)} commands, every verb, on local paths, the hub allowed: no connection tried, no name looked up")
