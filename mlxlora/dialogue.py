"""A conversation with a model that goes on, whose adapters can be turned up and down while it does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlxlora import mlxlm
from mlxlora.commands import command
from mlxlora.errors import ConfigError, MlxLoraError, nearest
from mlxlora.files import write_whole
from mlxlora.generate import SamplingConfig, stream
from mlxlora.model import LanguageModel
from mlxlora.prompts import ChatPrompts, Message, Prompt


@dataclass
class Dialogue:
    """Messages, and a model that answers them.

        dialogue = Dialogue(model)
        for piece in dialogue.say("Hello"):
            print(piece, end="")
        print(dialogue.command("/scale style 0.5"))

    messages: the conversation so far, as a training row has it
    """

    model: LanguageModel
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    system: str | None = None
    template: str | None = None
    messages: list[Message] = field(default_factory=list)
    _cache: list[Any] | None = field(default=None, repr=False)
    _held: list[int] = field(default_factory=list, repr=False)
    _asked: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        """Raises DataError when the model has no chat template and none is given."""
        self._prompts = ChatPrompts(self.model.tokenizer, template=self.template)
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system prompt alone."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self._forget()

    def say(self, text: str) -> Iterator[str]:
        """Say something to the model; yields its answer in pieces. Both are then part of the conversation.

        An answer that is not read to its end (an interrupt) is kept as far as it came.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._prompts(self.messages)
        except MlxLoraError:
            self.messages.pop()
            raise
        said: list[str] = []
        try:
            for piece in self._answer(prompt):
                said.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})

    def compare(self, text: str) -> dict[str, str]:
        """Answers to `text` without any adapter ("base") and with the adapters as they stand; none is kept."""
        prompt = self._prompts([*self.messages, {"role": "user", "content": text}])
        scales = dict(self.model.adapters.scales)
        answers = {}
        try:
            self.model.adapters.set_scales(dict.fromkeys(scales, 0.0))
            answers["base"] = "".join(piece.text for piece in stream(self.model, prompt, self.sampling))
        finally:
            self.model.adapters.set_scales(scales)
        name = " + ".join(f"{name}={scale:g}" for name, scale in scales.items() if scale) or "no adapter on"
        answers[name] = "".join(piece.text for piece in stream(self.model, prompt, self.sampling))
        return answers

    def scale(self, name: str, value: float) -> None:
        """Turn one adapter up or down; 0 is off. What the model has read is read anew."""
        self.model.adapters[name].scale = value
        self._forget()

    def row(self) -> dict[str, Any]:
        """The conversation as a training row."""
        if not any(message["role"] == "assistant" for message in self.messages):
            raise ConfigError("There is nothing to save yet: the model has not said anything.")
        return {"messages": [dict(message) for message in self.messages]}

    def save(self, path: Path) -> int:
        """Add the conversation to a JSONL file as a training row. Returns how many rows the file has then.

        The file is replaced as a whole, so that a crash never leaves half a row.
        """
        line = json.dumps(self.row(), ensure_ascii=False) + "\n"
        path = Path(path).expanduser()
        try:
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            if before and not before.endswith("\n"):
                before += "\n"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, before + line)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be written: {error}.") from None
        return (before + line).count("\n")

    def _answer(self, prompt: Prompt) -> Iterator[str]:
        cache, known = mlxlm.kept_cache(self.model.network, self._cache, self._held, prompt.tokens)
        self._cache, self._held = cache, list(prompt.tokens)
        rest = replace(prompt, tokens=prompt.tokens[known:])
        sampling = replace(self.sampling, seed=self.sampling.seed + self._asked)
        self._asked += 1
        for piece in stream(self.model, rest, sampling, cache=cache):
            self._held.append(piece.token)
            yield piece.text

    def _forget(self) -> None:
        self._cache, self._held, self._asked = None, [], 0

    # -- commands -----------------------------------------------------------------------------------------------------

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; returns what to tell the user.

        Raises ConfigError for a command that there is not, AdapterError for an adapter that there is not.
        """
        name, _, rest = line.strip().removeprefix("/").partition(" ")
        if name not in COMMANDS:
            raise ConfigError(f"There is no command /{name}.{nearest(name, list(COMMANDS))} /help lists them all.")
        return COMMANDS[name].run(self, rest.strip())


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a dialogue: how it is written, what it does, and the function that does it."""

    usage: str
    about: str
    run: Callable[[Dialogue, str], str]


def _scale(dialogue: Dialogue, rest: str) -> str:
    name, _, value = rest.rpartition(" ")
    try:
        number = float(value)
    except ValueError:
        name = ""
        number = 0.0
    if not name:
        raise ConfigError("Write /scale NAME NUMBER, such as /scale style 0.5; /adapters lists the names.")
    dialogue.scale(name.strip(), number)
    return str(dialogue.model.adapters)


def _save(dialogue: Dialogue, rest: str) -> str:
    if not rest:
        raise ConfigError("Write /save FILE, such as /save good.jsonl.")
    count = dialogue.save(Path(rest))
    rows = "1 row" if count == 1 else f"{count} rows"
    return f"saved to {rest} ({rows}); train on it: {command('train', model=dialogue.model.path, data=rest, out='RUN')}"


def _system(dialogue: Dialogue, rest: str) -> str:
    dialogue.system = rest or None
    dialogue.reset()
    return "a new conversation, with that system prompt" if rest else "a new conversation, without a system prompt"


def _undo(dialogue: Dialogue, _: str) -> str:
    asked = [index for index, message in enumerate(dialogue.messages) if message["role"] == "user"]
    if not asked:
        raise ConfigError("There is nothing to take back.")
    del dialogue.messages[asked[-1] :]
    return "took back the last question and its answer"


def _reset(dialogue: Dialogue, _: str) -> str:
    dialogue.reset()
    return "a new conversation"


def _compare(dialogue: Dialogue, rest: str) -> str:
    if not rest:
        raise ConfigError("Write /compare QUESTION: it is answered without and with the adapters.")
    return "\n".join(f"[{name}]\n{answer}" for name, answer in dialogue.compare(rest).items())


def _help(_: Dialogue, __: str) -> str:
    width = max(len(command.usage) for command in COMMANDS.values())
    return "\n".join(f"{command.usage:<{width}}  {command.about}" for command in COMMANDS.values())


COMMANDS: dict[str, Command] = {
    "help": Command("/help", "this list", _help),
    "adapters": Command("/adapters", "the adapters on the model and their scales", lambda d, _: str(d.model.adapters)),
    "scale": Command("/scale NAME NUMBER", "turn an adapter up or down; 0 is off", _scale),
    "compare": Command("/compare QUESTION", "answer without and with the adapters; neither is kept", _compare),
    "save": Command("/save FILE", "add the conversation to a JSONL file, as a row to train on", _save),
    "undo": Command("/undo", "take back the last question and its answer", _undo),
    "reset": Command("/reset", "begin a new conversation", _reset),
    "system": Command("/system TEXT", "begin a new conversation with this system prompt", _system),
    "exit": Command("/exit", "leave", lambda *_: ""),
}
