"""A run directory that somebody else prepared, with hashes that are right: it reaches no file and no weight of ours."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora import cli
from mlxlora.errors import FormatError, RunError
from mlxlora.files import MANIFEST, file_records, load_safetensors, save_safetensors, sweep_scratch
from mlxlora.training.checkpoint import FILES, read_checkpoint
from mlxlora.training.counters import Counters
from mlxlora.training.run import RunDirectory
from tests.faults import session

OPTIONS = session.STOPPED
Tensors = dict[str, mx.array]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session.stopped(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped / "run", tmp_path / "run"))


def refused(stopped: Path, run: Path, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Going on is refused in one line, and all weights, and all that the run directory leads to, are as they were."""
    before = contents(run.parent)
    capsys.readouterr()
    code = cli.main(session.flags(stopped / "model", stopped / "data.jsonl", run, OPTIONS))
    told = capsys.readouterr().err
    assert code == 2 and said in told and "Traceback" not in told, told
    assert contents(run.parent) == before


def contents(folder: Path) -> dict[str, bytes]:
    """All regular files below; of a run, but for what it begins with."""
    begun = (folder / "run" / "config.yaml", folder / "run" / "metrics.jsonl")
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return {str(path): path.read_bytes() for path in files if path not in begun}


def lead_away(path: Path, elsewhere: Path) -> None:
    """Put a link where `path` is, to the same thing elsewhere."""
    if path.exists():
        shutil.move(path, elsewhere)
    else:
        elsewhere.mkdir()
        (elsewhere / "old").mkdir()
        (elsewhere / "old" / "file").write_text("somebody's")
    path.symlink_to(elsewhere)


LINKS = [
    "metrics.jsonl", "config.yaml", "run.json", "checkpoints", "checkpoints/step-0000004", "adapter", ".best.tmp-a",
    "checkpoints/.step.tmp-a",
]  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_links_are_not_followed(name: str, stopped: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lead_away(run / name, run.parent / "elsewhere")
    refused(stopped, run, "is a link or a special file", capsys)
    with pytest.raises(RunError, match="link"):
        RunDirectory.look(run, overwrite=True)


def test_nobody_waits_for_a_pipe(stopped: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    refused(stopped, run, "is a link or a special file", capsys)


def test_scratch_that_is_a_link_is_taken_away_alone(tmp_path: Path) -> None:
    lead_away(tmp_path / ".adapter.tmp-a", tmp_path / "elsewhere")
    sweep_scratch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    assert (tmp_path / "elsewhere" / "old" / "file").read_text() == "somebody's"


def prepare(run: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a file of every checkpoint, and set the hashes right."""
    for place in (run / "checkpoints").iterdir():
        path = place / name
        if path.suffix == ".json":
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        else:
            tensors = load_safetensors(path)
            mx.eval(tensors)
            save_safetensors(path, change(tensors))
        manifest = json.loads((place / MANIFEST).read_text())
        (place / MANIFEST).write_text(json.dumps(manifest | {"files": file_records(place, FILES)}))


WEIGHTS: dict[str, Callable[[Tensors], Tensors]] = {
    "of the base": lambda t: {**t, "model.embed_tokens.weight": mx.zeros((512, 32))},
    "missing": lambda t: dict(list(t.items())[1:]),
    "misshapen": lambda t: {name: array[:1] for name, array in t.items()},
    "of another type": lambda t: {name: array.astype(mx.float16) for name, array in t.items()},
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=list(WEIGHTS))
def test_a_checkpoint_writes_no_weights_but_those_that_are_trained(
    change: Callable[[Tensors], Tensors], stopped: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(run, "adapter.safetensors", change)
    refused(stopped, run, "weights are not those that this run trains", capsys)


def test_an_optimizer_of_another_type(stopped: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(run, "optimizer.safetensors", lambda t: {name: array.astype(mx.int32) for name, array in t.items()})
    refused(stopped, run, "the optimizer's saved state does not fit", capsys)


@pytest.mark.parametrize("name", ["step", "epoch", "position", "counters"])
@pytest.mark.parametrize("value", [-1, "4", 4.0, 10**30, float("nan"), None, [1]])
def test_where_a_checkpoint_stands(name: str, value: Any, run: Path) -> None:
    prepare(run, "state.json", lambda state: state | {name: value})
    for place in (run / "checkpoints").iterdir():
        owner = json.loads((place / MANIFEST).read_text())["run"]
        with pytest.raises(FormatError, match=f"state.json: {name} cannot be right"):
            read_checkpoint(place, owner)


@pytest.mark.parametrize("name", [*Counters.__dataclass_fields__, "other"])
@pytest.mark.parametrize("value", ["1", [None], {}, 10**40, float("nan")])
def test_what_a_checkpoint_counts(name: str, value: Any) -> None:
    assert Counters.of({"tokens": 5, "best_loss": -0.5, "elapsed": 0.1, "losses": [1, 2.5]}).tokens == 5
    with pytest.raises(RunError, match=f"counters cannot be right: {name}"):
        Counters.of({name: value})


@pytest.mark.parametrize("chosen", [[1], "x", {"seed": 3}, {"batch_size": 0}, {"batch_size": "4"}, {"accumulate": 1e9}])
def test_what_a_run_chose(chosen: Any, stopped: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"chosen": chosen}))
    with pytest.raises(RunError, match="is not what this version"):
        RunDirectory.look(run)


def test_lines_that_are_no_events(stopped: Path, run: Path) -> None:
    strange = b'{"event": "step", "step": "x"}\n[1]\n{"event": "step", "step": null}\n\xff\xfe\n'
    (run / "metrics.jsonl").write_bytes(strange + (run / "metrics.jsonl").read_bytes())
    session.run(stopped / "model", stopped / "data.jsonl", run, OPTIONS)
    assert [event["step"] for event in session.told(run)] == [1, 2, 3, 4, 5, 6]
