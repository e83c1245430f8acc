"""The command line: names, flags, YAML, messages and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from mlxlora import cli
from mlxlora.errors import ConfigError, InputError


@dataclass(frozen=True)
class Options:
    """Options of a group."""

    rank: int = 16
    """the rank"""
    targets: list[str] = field(default_factory=lambda: ["all"])
    """what to wrap"""
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"adapter.rank is {self.rank}, but must be 1 or more.")


@dataclass(frozen=True)
class Result:
    """What the verb found."""

    model: str
    out: Path
    options: Options
    names: list[str]
    flag: bool
    steps: int | None

    def __str__(self) -> str:
        return f"wrote {self.out}"


def verb(
    model: str,
    out: Path,
    *,
    names: list[str] | None = None,
    adapter: Options = Options(),
    flag: bool = False,
    steps: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Result:
    """Do something.

    Args:
        model: the model
        steps: how many
    """
    if model == "broken":
        raise InputError("the model is broken.")
    assert on_progress is not None
    on_progress("working", 1, 2)
    return Result(model, out, adapter, names or [], flag, steps)


def listed(paths: list[str], *, json_lines: bool = False) -> str:
    """List what was given."""
    return "|".join(paths)


@pytest.fixture(autouse=True)
def verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    here = __name__
    monkeypatch.setitem(sys.modules, here, sys.modules[__name__])
    table = {
        "work": cli.Verb(f"{here}:verb", "do something"),
        "data list": cli.Verb(f"{here}:listed", "list", ("paths",)),
        "data drop": cli.Verb(f"{here}:listed", "drop", ("paths",)),
    }
    monkeypatch.setattr(cli, "VERBS", table)


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_flags_reach_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(
        capsys, "work", "--model", "m", "--out", "o", "--adapter.rank", "4", "--adapter.targets", "q_proj", "v_proj",
        "--adapter.targets", "k_proj", "--flag", "--names", "A=1", "--names=B=0.5", "--steps", "3", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out) == {
        "model": "m",
        "out": "o",
        "options": {"rank": 4, "targets": ["q_proj", "v_proj", "k_proj"], "kind": "a"},
        "names": ["A=1", "B=0.5"],
        "flag": True,
        "steps": 3,
    }
    assert "working" in err and "working" not in out


def test_a_result_is_text_without_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "work", "--model", "m", "--out", "o")[:2] == (0, "wrote o\n")


def test_yaml_is_the_same_tree_and_flags_come_on_top(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: m\nout: o\nsteps: 7\nadapter:\n  rank: 5\n  targets: [x]\n")
    code, out, _ = call(capsys, "work", "--config", str(config), "--adapter.rank", "6", "--json")
    result = json.loads(out)
    assert code == 0 and result["steps"] == 7
    assert result["options"] == {"rank": 6, "targets": ["x"], "kind": "a"}


def test_kebab_case_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "data", "list", "a", "b", "--json-lines")[:2] == (0, "a|b\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["wrk"], "Did you mean 'work'?"),
        (["data"], "data list, data drop"),
        (["work", "--out", "o"], "missing: --model"),
        (["work", "--model", "m", "--out", "o", "--adapter.rnk", "4"], "Did you mean 'adapter.rank'?"),
        (["work", "--model", "m", "--out", "o", "--stepz", "4"], "Did you mean 'steps'?"),
        (
            ["work", "--model", "m", "--out", "o", "--adapter.rank", "many"],
            "--adapter.rank is many, but must",
        ),
        (["work", "--model", "m", "--out", "o", "--adapter.rank", "0"], "adapter.rank is 0"),
        (["work", "--model", "m", "--out", "o", "--adapter.kind", "c"], "--adapter.kind"),
        (["work", "--model", "m", "--out", "o", "--adapter.targets"], "--adapter.targets needs a value"),
        (["work", "--model", "m", "--out", "o", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["work", "--model", "broken", "--out", "o"], "the model is broken"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and expected in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: m\nout: o\nadapter: {rnk: 4}\n", "Did you mean 'adapter.rank'?"),
        ("model: m\nout: o\nstepz: 4\n", "Did you mean 'steps'?"),
        ("model: [\n", "c.yaml"),
        ("- a\n- b\n", "c.yaml"),
        ("model: m\nmodel: n\nout: o\n", "model"),
        ("model: !!python/object/apply:os.system ['true']\n", "c.yaml"),
    ],
)
def test_wrong_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, expected: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    code, out, err = call(capsys, "work", "--config", str(config))
    assert (code, out) == (2, "")
    assert expected in err and "Traceback" not in err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0 and "work" in out and "do something" in out
    code, out, _ = call(capsys, "work", "--help")
    assert code == 0 and "the rank" in out and "how many" in out
    code, out, _ = call(capsys, "--version")
    assert code == 0 and out.startswith("mlxlora ")
    assert call(capsys)[0] == 2


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "mlxlora", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Did you mean 'train'?" in done.stderr
