"""A long run takes no more memory at its end than at its beginning; one that cannot fit is refused before it starts."""

import resource
import sys
from pathlib import Path

import pytest

from mlxlora import cli
from mlxlora.training.events import Event, Step
from tests import tiny
from tests.faults import session
from tests.faults.test_kill import whole
from tests.patience import PATIENCE


def resident() -> int:
    """Bytes of this process in memory now (on macOS: the most so far)."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def flat(folder: Path, steps: int, most: int) -> None:
    """most: bytes that the process may grow by, from the first half of the run (a fifth left aside) to the second.

    A report of 2,000 steps is as large as one can get, so after a fifth of the long form nothing has a reason to grow.
    """
    tiny.model_directory(folder / "model", "qwen3")
    session.rows(folder / "data.jsonl")
    # the most in each window: what is held at one moment depends on the batch
    early, late = [0, 0, 0], [0, 0, 0]

    def hear(event: Event) -> None:
        if isinstance(event, Step) and event.step > steps // 5:
            most_so_far = early if event.step <= steps // 2 else late
            most_so_far[:] = map(max, most_so_far, (resident(), event.memory, event.peak_memory))

    options = {
        "training.steps": steps, "training.batch_size": 2, "adapter.dropout": 0.1, "adapter.rank": 2,
        "training.save_every": max(steps // 10, 50), "training.validate_every": max(steps // 10, 50),
        "training.loss_chunk": 32,  # even in step, an array more or less may lie there: none of these is large
    }  # fmt: skip
    session.run(folder / "model", folder / "data.jsonl", folder / "run", options, on_event=hear)
    assert late[0] - early[0] <= most, f"the process grew from {early[0]:,} to {late[0]:,} bytes"
    assert late[1] <= early[1] + 150_000, f"MLX held {early[1]:,} bytes, now {late[1]:,}"
    assert late[2] <= early[2] + 150_000, f"the peak rose from {early[2]:,} to {late[2]:,} bytes"
    print(
        f"{steps:,} steps: process {early[0] / 1e6:.1f} MB in the first half, {late[0] / 1e6:.1f} MB in the second;"
        f" MLX {early[1]:,} and {late[1]:,} bytes, peak {early[2]:,} and {late[2]:,}"
    )


@pytest.mark.usefixtures("in_step")
def test_memory_is_flat_short(tmp_path: Path) -> None:
    flat(tmp_path, 200, most=4_000_000)


@pytest.mark.faults
@pytest.mark.usefixtures("in_step")
def test_memory_is_flat_long(tmp_path: Path) -> None:
    flat(tmp_path, 10_000, most=2_000_000)


def starve(words: list[str], said: Path) -> None:
    """A command to whose process the system gives no memory any more, once it has saved twice."""
    import mlx.core as mx

    from mlxlora.reporting.console import Console
    from mlxlora.training.events import Checkpoint

    hear = Console.event

    def event(console: Console, told: Event) -> None:
        hear(console, told)
        if isinstance(told, Checkpoint) and told.step >= 4:
            mx.set_cache_limit(0)
            mx.clear_cache()
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used, used))

    Console.event = event  # type: ignore[assignment, method-assign]
    session.command(words, said)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS knows no limit on a process's memory")
def test_memory_that_runs_out_in_the_midst_of_a_run(tmp_path: Path) -> None:
    tiny.model_directory(tmp_path / "model", "qwen3")
    session.rows(tmp_path / "data.jsonl")
    options = {"training.steps": 16, "training.save_every": 2, "training.batch_size": 2}
    words = session.flags(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "run", options)
    process = session.begin(starve, words, tmp_path / "said")
    process.join(timeout=PATIENCE)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 1 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("error: out of memory") and "--training.batch_size 1" in said, said
    whole(tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir()).name
    assert newest >= "step-0000004"
    again = session.begin(session.command, words, tmp_path / "said")
    again.join(timeout=PATIENCE)
    said = (tmp_path / "said").read_text()
    assert again.exitcode == 0 and f"going on after step {int(newest[5:])}" in said, said


def test_a_run_that_cannot_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.model_directory(tmp_path / "model", "qwen3", hidden_size=256, intermediate_size=1024)
    session.rows(tmp_path / "data.jsonl")
    words = session.flags(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "run", {"training.steps": 2})
    code = cli.main([*words, "--memory_limit", "2MB"])
    said = capsys.readouterr().err
    assert code in (1, 2) and "Traceback" not in said, said
    assert "will not fit" in said and "the limit is 2.0 MB" in said and "quantize" in said, said
    assert not (tmp_path / "run").exists()
