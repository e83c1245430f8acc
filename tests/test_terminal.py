"""What others wrote does not steer the terminal that it is shown on."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from mlxlora import chat, cli
from mlxlora.data.show import Piece, Shown, for_terminal
from mlxlora.errors import AdapterError, MlxLoraError
from mlxlora.reporting.console import Console
from mlxlora.terminal import OFF, TRAINED, visible, visible_result
from mlxlora.training.events import Notice

HOSTILE = "\x1b]0;title\x07\x1b[2K\r\x9b31m\u202egnp.exe"
STEERING = {*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), "\u202e"} - {"\n", "\t"}


def steers(text: str) -> bool:
    return bool(STEERING & set(text))


def test_every_character_that_steers_is_spelled_out() -> None:
    assert visible("a\tb\nü😀") == "a\tb\nü😀"
    assert visible(HOSTILE) == r"\x1b]0;title\x07\x1b[2K\x0d\x9b31m\u202egnp.exe"
    assert visible_result(f"{TRAINED}{HOSTILE}{OFF}") == f"{TRAINED}{visible(HOSTILE)}{OFF}"


def test_errors_and_notices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: list[str]) -> int:
        Console().event(Notice(0, HOSTILE))
        raise AdapterError(HOSTILE)

    monkeypatch.setattr(cli, "run", fail)
    assert cli.main([]) == 2
    said = capsys.readouterr().err
    assert said.count(r"\x1b]0;title") == 2 and not steers(said)


@pytest.mark.parametrize("terminal", [True, False])
def test_results(terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal they are made visible; a file or a pipe gets what there is."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    cli.execute(lambda: HOSTILE, {}, False)
    assert capsys.readouterr().out == f"{visible(HOSTILE) if terminal else HOSTILE}\n"


@pytest.mark.parametrize("colour", [True, False])
def test_tokens_of_data(colour: bool) -> None:
    sample = Shown("", 2, 1, (Piece(HOSTILE, (1,), 1.0), Piece(HOSTILE, (2,), 0.0), Piece(HOSTILE, (3,), 0.0, True)))
    text = for_terminal(sample, colour=colour)
    assert text.count(visible(HOSTILE)) == 3 and visible_result(text) == text


@dataclass
class Terminal(io.StringIO):
    """Something to write on, which says what it is."""

    terminal: bool

    def __post_init__(self) -> None:
        super().__init__()

    def isatty(self) -> bool:
        return self.terminal


class Talk:
    """A model that answers with what was said, and a command that fails with it."""

    def say(self, text: str) -> list[str]:
        return [text]

    def command(self, line: str) -> str:
        raise MlxLoraError(line)


@pytest.mark.parametrize(("terminal", "shown"), [(True, visible), (False, str)])
def test_a_conversation(terminal: bool, shown: Callable[[str], str]) -> None:
    out, err = Terminal(terminal), Terminal(terminal)
    chat.converse(Talk(), [HOSTILE, f"/scale {HOSTILE}"], out, err)  # type: ignore[arg-type]
    assert out.getvalue() == f"{shown(HOSTILE)}\n" and not steers(err.getvalue())
