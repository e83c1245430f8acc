"""The command line: a verb is a public function, its flags, help and YAML come from the function's signature.

This is the only module that prints results and decides exit codes. Results go to stdout, everything else to stderr.
Exit codes: 0 done, 1 failed, 2 wrong input or usage, 128 + n stopped by signal n (and saved).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple

from mlxlora.errors import ConfigError, Interrupted, MlxLoraError, Signalled, nearest
from mlxlora.files import plain, refusal_of
from mlxlora.terminal import visible, visible_result
from mlxlora.version import __version__


class Verb(NamedTuple):
    """One line of the table: where the function lives, what it does, which parameters stand without a flag."""

    function: str
    about: str
    positional: tuple[str, ...] = ()


VERBS: dict[str, Verb] = {
    "demo": Verb("mlxlora.demo.run:demo", "go the whole way once, offline, with the embedded model and data"),
    "convert": Verb("mlxlora.convert:convert", "make an MLX model of a Hugging Face model, and quantize it"),
    "data check": Verb("mlxlora.data.check:check", "look at data: lengths, every token's loss, warnings", ("data",)),
    "data convert": Verb("mlxlora.data.convert:convert", "write data as messages or ShareGPT", ("data",)),
    "plan": Verb("mlxlora.plan:plan", "will it fit, and how long will it take?"),
    "tune": Verb("mlxlora.tune:tune", "search for a good learning rate, rank and targets"),
    "train": Verb("mlxlora.finetune:finetune", "fine-tune a model on your data"),
    "eval": Verb("mlxlora.evaluate:evaluate", "loss and perplexity on data, without and with adapters"),
    "compare": Verb("mlxlora.compare:compare", "base and tuned side by side on held-out rows: is it better?"),
    "generate": Verb("mlxlora.generate:generate", "let a model answer a prompt"),
    "chat": Verb("mlxlora.chat:chat", "talk to a model, and turn its adapters up and down while talking"),
    "serve": Verb("mlxlora.serve:serve", "answer OpenAI-compatible requests, adapters chosen by name"),
    "fuse": Verb("mlxlora.fuse:fuse", "fold adapters into a model, and measure what that changed"),
    "merge": Verb("mlxlora.merge:merge", "make one adapter of several", ("adapter",)),
    "export": Verb("mlxlora_convert.export:export", "write an adapter or a model in another program's format"),
    "import": Verb("mlxlora_convert.export:import_", "read an adapter or a model of another program", ("source",)),
    "upload": Verb(
        "mlxlora_convert.upload:upload",
        "send an adapter or a model to the Hugging Face hub, private by default",
        ("source",),
    ),
    "report": Verb("mlxlora.reporting.report:report", "one HTML file about one or several runs", ("runs",)),
    "doctor": Verb("mlxlora.doctor:doctor", "look at this machine: versions, memory, speed, what is missing"),
    "completion": Verb(
        "mlxlora.completion:completion", "completion of verbs and flags for bash, zsh or fish", ("shell",)
    ),
}
"""In the order in which a person meets them. A verb of two words (`data check`) is found by both."""


def command() -> int:
    """`main` in a process of its own, which signals end in good order (`mlxlora_start.py`: until here)."""
    from mlxlora.training.events import heeded

    def end(signum: int, frame: FrameType | None) -> None:
        raise Signalled(signum)

    numbers = heeded()
    for number in numbers:
        signal.signal(number, end)
    code = main()
    for number in numbers:  # it is done, and its exit code says so
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # else the interpreter goes through all that was loaded once more before it ends: half a second
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    # transformers would tell everybody that PyTorch is missing, which nothing here needs
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return run(words)
    except MlxLoraError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        number = error.signum if isinstance(error, Signalled) else signal.SIGINT
        print("interrupted" if number == signal.SIGINT else f"stopped by {number.name}", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        if debug:
            traceback.print_exc()
        refusal = refusal_of(error)
        print(f"error: {visible(str(refusal))}", file=sys.stderr)
        return refusal.exit_code


def run(words: list[str]) -> int:
    """Run the verb that `words` name, or tell the verbs or the version. Returns the exit code; lets errors pass."""
    if len(words) > 1 and words[0] == "help":  # `help train` is `train --help`
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"mlxlora {__version__}")
        return 0
    from mlxlora import flags, usage

    name, rest = find_verb(words)
    verb = VERBS[name]
    module, _, attribute = verb.function.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    parser = flags.build_parser(function, verb.positional)
    if "-h" in rest or "--help" in rest:
        print(usage.page(parser, name, verb.positional))
        return 0
    arguments = flags.parse(parser, flags.normalise(parser, rest))
    as_json = bool(arguments.pop("json"))
    arguments.pop("config", None)
    return execute(function, arguments, as_json)


def overview() -> str:
    """What `mlxlora --help` prints."""
    width = max(len(name) for name in VERBS)
    lines = [f"  {name:<{width}}  {verb.about}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"mlxlora {__version__}: fine-tune language models with MLX",
            "",
            "usage: mlxlora VERB [flags]          mlxlora VERB --help tells the flags of a verb",
            "",
            *lines,
            "",
            "Every verb takes --json (the result as one JSON object), --config FILE.yaml and --traceback.",
        ]
    )


def find_verb(words: list[str]) -> tuple[str, list[str]]:
    """(verb, the words after it). Raises ConfigError where there is none of that name."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in VERBS:
            return name, words[count:]
    branches = [name for name in VERBS if name.startswith(f"{words[0]} ")]
    if branches:
        raise ConfigError(f"'{words[0]}' needs one more word: {', '.join(branches)}.")
    raise ConfigError(
        f"there is no verb '{words[0]}'.{nearest(words[0], list(VERBS))} `mlxlora --help` lists them all."
    )


def execute(function: Callable[..., Any], arguments: dict[str, Any], as_json: bool) -> int:
    """Call the function with a console and, where it can be stopped, with signals; print what it returns."""
    import inspect

    from mlxlora.reporting.console import Console

    parameters = inspect.signature(function).parameters
    with Console() as console:
        if "on_progress" in parameters:
            arguments["on_progress"] = console.progress
        if "on_event" in parameters:
            arguments["on_event"] = console.event
        control = None
        if "control" in parameters:
            from mlxlora.training.events import Control

            control = arguments["control"] = Control()
            with control.signals():
                try:
                    result = function(**arguments)
                except KeyboardInterrupt:
                    if control.signum is None:
                        raise
                    raise Interrupted(
                        f"stopped at once by {signal.Signals(control.signum).name}; what was saved before is whole.",
                        control.signum,
                    ) from None
        else:
            result = function(**arguments)
    if as_json:
        print(json.dumps(plain(result), ensure_ascii=False, indent=2))
    elif result is not None:
        print(visible_result(str(result)) if sys.stdout.isatty() else result)  # elsewhere, byte for byte
    if control is not None and control.signum is not None and getattr(result, "reason", "stopped") == "stopped":
        return 128 + control.signum
    return 0
