"""Signals: a checkpoint within one step, exit code 128 + n, and the same command goes on; a second stops at once.

Verbs that do not train end at once, and leave nothing behind.
"""

import contextlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mlxlora.files.publish as publishing
from mlxlora.chat import converse
from mlxlora.errors import Signalled
from mlxlora.files import sha256
from mlxlora.training.events import Control, Event, Step
from tests import tiny
from tests.faults import session
from tests.faults.test_kill import whole
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONG = {"training.steps": 100_000, "training.save_every": 10_000, "training.batch_size": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    tiny.model_directory(folder / "model", "qwen3")
    session.rows(folder / "data.jsonl")
    return folder


def newest(out: Path) -> int:
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=-1)


def interrupt(
    place: Path, out: Path, numbers: list[signal.Signals], after: int, options: dict[str, Any], pause: float = 0.005,
    ignored: Sequence[signal.Signals] = (),
) -> int:  # fmt: skip
    """Send signals once `after` steps are reported, `pause` seconds between two. Returns the exit code."""
    words = session.flags(place / "model", place / "data.jsonl", out, options)
    process = session.begin(session.command, words, out.with_suffix(".said"), ignored)
    assert process.pid is not None
    until = time.monotonic() + PATIENCE
    while session.steps(out) < after and process.exitcode is None:
        assert time.monotonic() < until, "the run does not get on"
        time.sleep(0.02)
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        time.sleep(pause)
    process.join(timeout=PATIENCE)
    code = process.exitcode
    assert code is not None, out.with_suffix(".said").read_text()
    process.close()
    return code


def saves_and_says_so(place: Path, number: signal.Signals) -> Path:
    """Interrupt a run; returns its directory."""
    out = place / number.name
    code = interrupt(place, out, [number], after=3, options=LONG)
    said = out.with_suffix(".said").read_text()
    assert code == 128 + number, said
    assert newest(out) == session.steps(out) >= 3, "the checkpoint is that of the last step that was reported"
    assert "stopped and saved; the same command goes on from here" in said and "Traceback" not in said
    whole(out)
    return out


def test_a_signal_saves_and_says_so(place: Path) -> None:
    out = saves_and_says_so(place, signal.SIGTERM)  # going on is what test_kill.py looks at
    shutil.rmtree(out)


@pytest.mark.faults
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_the_run_goes_on(place: Path, number: signal.Signals) -> None:
    out = saves_and_says_so(place, number)
    before = session.steps(out)
    assert interrupt(place, out, [number], after=before + 2, options=LONG) == 128 + number
    assert newest(out) == session.steps(out) >= before + 2


def test_a_second_one_stops_at_once_without_damage(place: Path) -> None:
    out = place / "twice"
    code = interrupt(place, out, [signal.SIGINT, signal.SIGINT], after=3, options=LONG | {"training.save_every": 2})
    assert code == 130, out.with_suffix(".said").read_text()
    whole(out)
    assert newest(out) >= 2
    assert "Traceback" not in out.with_suffix(".said").read_text()


@pytest.mark.faults
def test_second_ones_at_many_moments(place: Path) -> None:
    """Two signals of any kinds, from 0 to 60 ms apart, into a run that saves every other step."""
    chosen, options = random.Random(3), LONG | {"training.save_every": 2}
    out, codes = place / "many", []
    for number in range(24):
        numbers = [chosen.choice(SIGNALS), chosen.choice(SIGNALS)]
        before = session.steps(out)
        code = interrupt(place, out, numbers, before + 3, options, pause=chosen.uniform(0, 0.06))
        said = out.with_suffix(".said").read_text()
        assert code in {128 + n for n in numbers} and "Traceback" not in said, (number, numbers, code, said)
        whole(out)
        assert newest(out) >= before + 2 - before % 2
        codes.append("saved" if "stopped and saved" in said else "at once")
    print(f"{len(codes)} pairs of signals: {codes.count('at once')} stopped at once, every published directory whole")


def reads_for_long(words: list[str], said: Path) -> None:
    """A run that is still reading its model when a signal meets it."""

    def load(*_: Any, **__: Any) -> None:
        said.with_suffix(".reads").touch()
        time.sleep(2 * PATIENCE)

    vars(importlib.import_module("mlxlora.finetune"))["load"] = load
    session.command(words, said)


@pytest.mark.parametrize("number", SIGNALS)
def test_one_before_the_first_step_leaves_nothing(place: Path, number: signal.Signals) -> None:
    out = place / f"early-{number.name}"
    said, reads = out.with_suffix(".said"), out.with_suffix(".reads")
    process = session.begin(reads_for_long, session.flags(place / "model", place / "data.jsonl", out, LONG), said)
    while process.exitcode is None and not reads.exists():
        time.sleep(0.01)
    assert process.pid is not None and process.exitcode is None, said.read_text()
    os.kill(process.pid, number)
    process.join(timeout=PATIENCE)
    assert process.exitcode == 128 + number, said.read_text()
    assert "stopped at once" in said.read_text() and "Traceback" not in said.read_text()
    assert newest(out) == -1 and not (out / "adapter").exists()


def test_a_stop_does_not_wait_for_a_validation_and_the_run_ends_the_same(place: Path) -> None:
    options = {"training.steps": 8, "training.validate_every": 4, "training.save_every": 100, "adapter.dropout": 0.1}
    paths = (place / "model", place / "data.jsonl")
    session.run(*paths, place / "calm", options)

    def at(step: int) -> tuple[Control, list[Event]]:
        control, events = Control(), []

        def hear(event: Event) -> None:
            events.append(event)
            if isinstance(event, Step) and event.step == step:
                control.stop()

        session.run(*paths, place / "stopped", options, control=control, on_event=hear)
        return control, events

    for step in (4, 8):  # a validation is due after each of these
        _, events = at(step)
        assert not [e for e in events if type(e).__name__ == "Validation" and e.step == step]
        state = json.loads((place / "stopped" / "checkpoints" / f"step-{step:07d}" / "state.json").read_text())
        assert state["counters"]["owes_validation"]
    at(-1)
    assert session.told(place / "stopped") == session.told(place / "calm")
    for name in ("adapter", "best"):
        files = [place / run / name / "adapters.safetensors" for run in ("stopped", "calm")]
        assert sha256(files[0]) == sha256(files[1])


def test_what_nohup_has_ignored_stays_ignored(place: Path) -> None:
    """The terminal was closed; another signal still stops the run."""
    out = place / "nohup"
    numbers = [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM]
    assert interrupt(place, out, numbers, after=3, options=LONG, ignored=[signal.SIGHUP]) == 128 + signal.SIGTERM
    assert "stopped and saved" in out.with_suffix(".said").read_text()


BEGIN = """
import importlib, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # which a test in the background has inherited as ignored
class Told:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            print("now", flush=True)
            time.sleep(600)
sys.meta_path.insert(0, Told())
module, _, function = sys.argv[2].partition(":")
sys.exit(getattr(importlib.import_module(module), function)())
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("imported", ["mlxlora", "mlx.core", "mlxlora.flags"])
def test_one_while_python_still_imports_the_command(imported: str, number: signal.Signals) -> None:
    """Caught in the midst of the import of that module, by the entry that the shell calls."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["mlxlora"]
    words = [sys.executable, "-c", BEGIN, imported, entry]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "now\n"
            process.send_signal(number)
            out, said = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()  # one that minds no signal would keep the test
    assert said == ("interrupted\n" if number == signal.SIGINT else f"stopped by {number.name}\n")
    assert process.returncode == 128 + number and not out


def unhurried(words: list[str], said: Path) -> None:
    """A command that is not done before a signal can meet it, however busy the machine is."""
    publishing.sync = lambda path: time.sleep(600)
    session.command(words, said)


@pytest.mark.parametrize("number", SIGNALS)
def test_other_verbs_end_at_once_and_clear_up(place: Path, number: signal.Signals) -> None:
    work, said = place / f"export-{number.name}", place / f"export-{number.name}.said"
    work.mkdir()
    words = ["export", "--model", place / "model", "--to", "gguf", "--out", work / "out.gguf"]
    process = session.begin(unhurried, list(map(str, words)), said)
    while process.exitcode is None and not list(work.iterdir()):
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number, said.read_text()
    last = said.read_text().splitlines()[-1]
    assert last == ("interrupted" if number == signal.SIGINT else f"stopped by {number.name}")
    assert not list(work.iterdir())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_server_ends_as_it_should(place: Path, number: signal.Signals) -> None:
    """That is how one is stopped, so it is no failure; what it has done is told."""
    said = place / f"serve-{number.name}.said"
    process = session.begin(session.command, ["serve", "--model", str(place / "model"), "--port", "0"], said)
    while process.exitcode is None and not (said.exists() and "Ctrl-C stops" in said.read_text()):
        time.sleep(0.01)
    found = re.search(r"Listening on (\S+)", said.read_text())
    assert found and process.pid is not None, said.read_text()
    with urllib.request.urlopen(f"{found[1]}/models", timeout=PATIENCE) as answer:
        assert json.load(answer)["object"] == "list"
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 0, said.read_text()
    told = said.read_text()
    assert "stopping" in told and "Traceback" not in told and told.splitlines()[-1].startswith(found[1][:-3])


def test_only_ctrl_c_is_meant_for_an_answer() -> None:
    """In a conversation it stops the answer; the others end the program."""
    said = io.StringIO()
    dialogue: Any = SimpleNamespace(say=lambda line: answer())

    def answer() -> Iterator[str]:
        yield "so far"
        raise Signalled(number)

    number = signal.SIGINT
    converse(dialogue, ["one", "two"], said, said)
    assert said.getvalue().count("so far\n(stopped)") == 2
    number = signal.SIGTERM
    with pytest.raises(Signalled, match="SIGTERM"):
        converse(dialogue, ["one"], said, said)


def test_the_python_api_installs_no_handlers(place: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    seen = []
    session.run(
        place / "model", place / "data.jsonl", place / "api", {"training.steps": 1},
        on_event=lambda _: seen.append([signal.getsignal(number) for number in numbers]),
    )  # fmt: skip
    assert seen and all(handlers == before for handlers in seen)
