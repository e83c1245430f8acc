"""The line prompt of `mlxlora chat`: reads lines, prints answers. What is said and done is `dialogue.Dialogue`'s."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TextIO

from mlxlora.dialogue import Dialogue
from mlxlora.errors import MlxLoraError, Signalled
from mlxlora.generate import SamplingConfig
from mlxlora.model import load
from mlxlora.terminal import visible


@dataclass(frozen=True, slots=True)
class ChatResult:
    """What was said.

    messages: the conversation when it was left
    turns:    how many answers the model gave
    """

    messages: list[dict[str, str]]
    turns: int

    def __str__(self) -> str:
        return ""


def chat(
    model: str,
    *,
    adapter: list[str] | None = None,
    system: str | None = None,
    template: str | None = None,
    sampling: SamplingConfig = SamplingConfig(temperature=0.7),  # noqa: B008 - frozen
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ChatResult:
    """Talk to a model, and turn its adapters up and down while talking.

    /scale NAME NUMBER changes the strength of an adapter, /compare answers without and with the adapters, /save adds
    the conversation to a file of training rows, /help lists all commands. Ctrl-C stops an answer, Ctrl-D leaves.
    When standard input is no terminal, each of its lines is a question or a command.

    Args:
        model: a model directory, or a name on the hub
        adapter: `PATH` or `PATH=SCALE`, any number; a run directory will do
        system: a system prompt
        template: a chat template instead of the model's own: a known name or a Jinja file
        sampling: how tokens are chosen
        revision: branch, tag or commit on the hub
        trust_remote_code: allow the model to run Python files of its own

    Raises:
        ModelError, AdapterError: something is wrong with the model or an adapter
        DataError: the model has no chat template, and none was given
    """
    loaded = load(model, revision=revision, trust_remote_code=trust_remote_code, adapter=adapter or ())
    dialogue = Dialogue(loaded, sampling, system, template)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        on = f" with {', '.join(loaded.adapters.scales)}" if len(loaded.adapters) else ""
        print(f"{model}{on}. /help lists the commands.", file=sys.stderr)
    lines = _typed() if interactive else (line.rstrip("\n") for line in sys.stdin)
    converse(dialogue, lines, sys.stdout, sys.stderr)
    turns = sum(message["role"] == "assistant" for message in dialogue.messages)
    return ChatResult([dict(message) for message in dialogue.messages], turns)


def _typed() -> Iterator[str]:
    """Lines from a terminal, with editing and history; ends at Ctrl-D."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - makes input() editable

    while True:
        try:
            yield input("» ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt as error:
            refuse_others(error)
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)


def refuse_others(error: KeyboardInterrupt) -> None:
    """Raise it again unless it is Ctrl-C, which alone is meant for an answer and not for the program."""
    if isinstance(error, Signalled) and error.signum != signal.SIGINT:
        raise error


def converse(dialogue: Dialogue, lines: Iterable[str], out: TextIO, err: TextIO) -> None:
    """Answer each line, carry out each command, until `/exit` or the last line."""
    for line in lines:
        if not line.strip():
            continue
        try:
            if not line.lstrip().startswith("/"):
                _answer(dialogue, line, out, err)
                continue
            told = dialogue.command(line)
            if line.split()[0] == "/exit":
                return
            print(visible(told) if out.isatty() else told, file=out)
        except MlxLoraError as error:  # a command gone wrong is no reason to lose the conversation
            print(f"error: {visible(str(error))}", file=err)


def _answer(dialogue: Dialogue, line: str, out: TextIO, err: TextIO) -> None:
    answer = dialogue.say(line)
    try:
        for piece in answer:
            print(visible(piece) if out.isatty() else piece, end="", file=out, flush=True)
        print(file=out)
    except KeyboardInterrupt as error:
        refuse_others(error)
        print("\n(stopped)", file=err)
    finally:
        if hasattr(answer, "close"):
            answer.close()
