"""What a newcomer types wrong: one message, never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxlora import cli


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


def test_choices_are_written_alike_where_lines_wrap() -> None:
    text = cli.readable("(type: Literal['one', 'two',\n    'three'], default: one)")
    assert text == "(type: one | two |\n    three, default: one)"
