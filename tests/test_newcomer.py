"""What a newcomer types wrong: one message, never a traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlxlora import cli
from mlxlora.files import write_whole
from tests import tiny
from tests.patience import PATIENCE


def put(out: Path) -> None:
    """Write a file where a directory may stand."""
    write_whole(out, "x")


def test_a_target_below_a_file_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "taken").write_text("mine")
    assert cli.main(["data", "convert", str(rows), "--out", str(tmp_path / "taken" / "below")]) in (1, 2)
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and "taken" in shown and "Traceback" not in shown
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_stray_word_is_not_called_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "extra"]) == 2
    assert "unexpected: extra" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_speaks_no_python(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert cli.main([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mlxlora {verb}") and all(len(line) <= 110 for line in text.splitlines())
    assert not re.search(
        r"Literal|Optional|Union|<class|typing|null\b(?! for)|\bNone\b|help\s+Show the help|_ |\(default: \)", text
    )
    bare = [line for line in text.splitlines() if re.match(r"  (--)?\S+( \S+)*$", line)]
    below = text.splitlines()
    assert all(below[below.index(line) + 1].startswith(" " * 20) for line in bare), "a flag without a word about it"


def test_help_lists_the_options_of_groups_that_may_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Options of --to gguf:" in text and "--gguf.type f32|f16|bf16|" in text and "(default: f16)" in text
    assert cli.main(["plan", "--help"]) == 0
    assert "  --for TEXT " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("eval --model m --data d --split foo", "--split is foo, but must be one of auto, train, valid, test."),
        ("convert --model m --out q --dtype int8", "--dtype is int8, but must be one of float32, float16, bfloat16."),
        ("export --model m --out e.gguf --to gguf --gguf.type q99", "--gguf.type is q99, but must be one of f32"),
        ("train --model m --data d --out o --adapter.layers foo", "a list such as [1, 2] or a whole number or all."),
        ("train --model m --data d --out o --optimizer.betas 0.9", "but must be two numbers such as [0.9, 0.99]."),
        ("data check", "missing: DATA, --model"),
        ("train --model m --data d --out o --adapter.rank 1.5", "--adapter.rank is 1.5, but must be a whole number."),
        ("train --model m --data d --out o --gentle maybe", "--gentle is maybe, but must be true or false."),
        ("train --model m --data d --out o --adapter.rank_pattern q", "--adapter.rank_pattern is q, but must be names"),
        (
            "export --model m --to gguf --out e.gguf --gguf.typ f16",
            "unknown option --gguf.typ. Did you mean 'gguf.type'",
        ),
        (
            "export --model m --to gguf --out e.gguf --gguf f16",
            "a group of options. Give them one by one (--gguf.type, …)",
        ),
        ("convert --model m --out o --quantize.bit 4", "unknown option --quantize.bit. Did you mean 'quantize.bits'?"),
        ("plan --fro M2", "unknown option --fro. Did you mean 'for'?"),
        ("train --model m --data d --out=", "--out is empty"),
        ("train --model m --out o --data=", "--data is empty"),
    ],
)
def test_messages_name_the_option_and_the_choices(capsys: pytest.CaptureFixture[str], line: str, expected: str) -> None:
    assert cli.main(line.split()) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and expected in shown and "Union" not in shown


def test_help_of_a_verb_in_either_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", "fuse"]) == 0
    assert "usage: mlxlora fuse" in capsys.readouterr().out


def test_the_target_is_named_and_not_the_scratch_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cli.VERBS, "put", cli.Verb("tests.test_newcomer:put", "write a file"))
        assert cli.main(["put", "--out", str(tmp_path / "folder")]) == 2
    shown = capsys.readouterr().err
    assert f"{tmp_path / 'folder'}" in shown and "Traceback" not in shown
    assert not list((tmp_path / "folder").iterdir()) and len(list(tmp_path.iterdir())) == 1


def test_a_report_of_nothing_says_that_it_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_an_empty_directory_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "empty").mkdir()
    assert cli.main(["data", "check", str(rows), "--model", str(tmp_path / "empty")]) == 2
    assert "there is no config.json" in capsys.readouterr().err


def test_a_value_without_a_flag_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--help"]) == 0
    assert "run directories" in capsys.readouterr().out


WITHOUT_TORCH = """
import importlib.util as util, sys
found = util.find_spec
util.find_spec = lambda name, *more: None if name == "torch" else found(name, *more)
from mlxlora import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_nobody_is_told_that_pytorch_is_missing(tmp_path: Path) -> None:
    model = tiny.model_directory(tmp_path / "model", "llama")
    rows = tiny.chats(tmp_path / "rows.jsonl", 3)
    words = ["data", "check", str(rows), "--model", str(model)]
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stderr


@pytest.mark.parametrize("columns", [5, 40, 200])
def test_help_on_terminals_of_any_width(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["train", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if line.startswith(" ") and not line.strip().startswith("--")]
    assert told and max(map(len, told)) <= max(40, min(columns, 110))
