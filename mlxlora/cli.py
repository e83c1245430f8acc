"""The command line: a verb is a public function, its flags, help and YAML come from the function's signature.

This is the only module that prints results and decides exit codes. Results go to stdout, everything else to stderr.
Exit codes: 0 done, 1 failed, 2 wrong input or usage, 128 + n stopped by signal n (and saved).
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxlora.errors import ConfigError, Interrupted, MlxLoraError, nearest
from mlxlora.files import plain
from mlxlora.version import __version__

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


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

SUPPLIED = ("control",)  # parameters that the command line fills in by itself, beside every `on_…`


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        return run(words)
    except MlxLoraError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:  # a path that cannot be read or written: say which, and what the system says
        if debug:
            traceback.print_exc()
        path = error.filename2 or error.filename  # of a failed rename the target, not our scratch file
        where = f"{path}: " if path else ""
        print(
            f"error: {where}{error.strerror or error}. Choose another path, or check its permissions.", file=sys.stderr
        )
        return 1


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
    name, rest = find_verb(words)
    verb = VERBS[name]
    module, _, attribute = verb.function.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    parser = build_parser(name, verb, function)
    if "-h" in rest or "--help" in rest:
        print(readable(parser.format_help()))
        return 0
    arguments = parse(parser, normalise(parser, verb, rest))
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


def build_parser(name: str, verb: Verb, function: Callable[..., Any]) -> ArgumentParser:
    """The flags of a verb, from its function's signature and docstring."""
    import inspect

    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parameters = inspect.signature(function).parameters
    supplied = {parameter for parameter in parameters if parameter.startswith("on_") or parameter in SUPPLIED}
    # no abbreviations: an option that a later version adds must not change what a command means
    parser = ArgumentParser(
        prog=f"mlxlora {name}", exit_on_error=False, print_config=None, description=verb.about, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a YAML file with the same tree of options")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    if verb.positional:
        import docstring_parser  # what jsonargparse reads the other helps with

        about = {each.arg_name: each.description for each in docstring_parser.parse(function.__doc__ or "").params}
        hints = inspect.get_annotations(function, eval_str=True)
        for parameter in verb.positional:
            many = "list" in str(hints[parameter])
            kind = hints[parameter]
            if many:
                parser.add_argument(parameter, type=str, nargs="+", help=about.get(parameter))
            else:
                parser.add_argument(parameter, type=kind, help=about.get(parameter))
    parser.add_function_arguments(function, skip={*supplied, *verb.positional}, fail_untyped=True)
    return parser


def normalise(parser: ArgumentParser, verb: Verb, words: list[str]) -> list[str]:
    """Spell the flags as the parser wants them.

    `--max-length` becomes `--max_length`; a switch needs no value; a list takes several values and several flags.
    """
    actions = parser._option_string_actions
    result: list[str] = []
    lists: dict[str, list[str]] = {}
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("--"):
            result.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in actions:
            flag = "--" + flag[2:].replace("-", "_")
        if flag not in actions and f"{flag}_" in actions:  # a parameter that Python will not have by that name
            flag += "_"
        action = actions.get(flag)
        kind = kind_of(action)
        if "list[" in kind.lower():
            values = [value] if equals else []
            while not equals and index < len(words) and not words[index].startswith("--"):
                values.append(words[index])
                index += 1
            if not values:
                raise ConfigError(f"{flag} needs a value.")
            lists.setdefault(flag, []).extend(values)
        elif kind == "<class 'bool'>" and not equals and (index == len(words) or words[index].startswith("--")):
            result.append(f"{flag}=true")
        elif "Path" in kind and (value if equals else "".join(words[index : index + 1])) == "":
            raise ConfigError(f"{flag} is empty. Give a path.")
        elif kind in TEXTS and (equals or (index < len(words) and not words[index].startswith("--"))):
            if not equals:
                value = words[index]
                index += 1
            result.append(f"{flag}={value}")
        else:
            result.append(flag + equals + value)
    for flag, values in lists.items():
        if "" in values:  # as of an unset variable of the shell; as a path it would mean the current directory
            raise ConfigError(f"{flag} is empty. Give a value.")
        kind = kind_of(actions[flag])
        alone = len(values) == 1 and (values[0].startswith("[") or "Union" in kind)  # a number may mean itself there
        if "[str]" in kind:
            result.append(f"{flag}={values[0] if alone else quoted(values)}")
        else:
            result.append(f"{flag}={values[0] if alone else '[' + ','.join(values) + ']'}")
    return result


TEXTS = ("typing.Optional[str]", "str | None", "typing.Optional[pathlib.Path]", "pathlib.Path | None")


def quoted(values: list[str]) -> str:
    """Texts as a list in YAML, whatever they hold."""
    import yaml

    written: str = yaml.safe_dump(values, default_style='"', default_flow_style=True, width=10**9, allow_unicode=True)
    return written.rstrip("\n")


def kind_of(action: Any) -> str:
    """The annotation behind a flag, as text."""
    return str(getattr(action, "_typehint", ""))


def parse(parser: ArgumentParser, words: list[str]) -> dict[str, Any]:
    """The arguments of the function. Raises ConfigError for anything that the parser does not take."""
    from argparse import ArgumentError

    known = [flag.lstrip("-") for flag in parser._option_string_actions if not flag.endswith("+")]
    check_config_files(words, {name.partition(".")[0] for name in known if "." in name})
    try:
        given = parser.parse_args(words)
        for word in words:  # texts that YAML reads as no value at all, such as `# Rules` or `~`
            flag, _, text = word.partition("=")
            action = parser._option_string_actions.get(flag)
            if (
                action is not None
                and kind_of(action) in TEXTS
                and text not in ("", "null")
                and given[action.dest] is None
            ):
                given[action.dest] = Path(text) if "Path" in kind_of(action) else text
        return dict(vars(parser.instantiate(given)))
    except ArgumentError as error:
        raise ConfigError(explain(str(error), known)) from None


def check_config_files(words: list[str], groups: set[str]) -> None:
    """Read every --config file with our own careful reader first: safe YAML, no key twice, mappings for all groups."""
    from mlxlora.files import read_yaml

    for index, word in enumerate(words):
        if word.partition("=")[0] != "--config":
            continue
        path = word.partition("=")[2] or (words[index + 1] if index + 1 < len(words) else "")
        if not path:
            continue
        content = read_yaml(Path(path))
        if not isinstance(content, dict):
            raise ConfigError(f"{path} does not hold options by name. Write lines such as `model: DIR`.")
        for name in sorted(groups & content.keys()):
            if not isinstance(content[name], dict):
                raise ConfigError(f"{path}: {name} holds options by name, not {content[name]!r}.")


def readable(text: str) -> str:
    """A help text without the names of Python's classes."""
    import re

    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", lambda match: match[1].lower(), text)
    text = re.sub(r"\s*\|\s*list\[Any\]", "", text)  # rows, which only Python can give
    text = re.sub(r"Optional\[([^\n]*?)\](?=[,)])", r"\1 | null", text)
    return re.sub(r"Literal\[([^\]]*)\]", lambda match: re.sub(r",(\s)", r" |\1", match[1].replace("'", "")), text)


KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list such as [1, 2]",
    "List": "a list such as [1, 2]",
    "tuple": "a list such as [0.9, 0.99]",
}


def explain(message: str, known: list[str]) -> str:
    """jsonargparse's message, with the nearest known option beside an unknown one."""
    import re

    if match := re.match(r"unrecognized arguments: ([^-].*)", message):
        return f"unexpected: {match[1]}. Values stand after their --option; quote one that holds spaces."
    if match := re.match(r"unrecognized arguments: (?:--)?([\w.+-]+)", message):
        name = match[1]
        return f"unknown option --{name}.{nearest(name, known)}"
    if match := re.search(r"Group '(\S+)' does not accept option '(\S+)'", message):
        name = f"{match[1]}.{match[2]}"
        return f"unknown option {name}.{nearest(name, known)}"
    if match := re.search(r"(?:Key|Option) '(\S+)' is not (?:expected|accepted)", message):
        return f"unknown option {match[1]}.{nearest(match[1], known)}"
    if match := re.match(r"the following arguments are required: (.*)", message):
        return "missing: " + ", ".join(
            f"--{name}" if name in known else name.upper() for name in match[1].replace(",", " ").split()
        )
    if match := re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.S):
        what = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", match[2]).replace("typing.", "")
        inner = re.search(r'Parser key "(\w+)"', what)  # the field of a group that may also be left out
        name = f"{match[1]}.{inner[1]}" if inner else match[1]
        given = re.search(r"Got value: (\S+)|Given value: (\S+)", what)
        kinds = {
            f"one of {choices.replace(chr(39), '')}" if kind == "Literal" else KINDS.get(kind, kind)
            for kind, choices in re.findall(r"Expected an? (\w+)(?:\[(.*?)\])?", what)
            if kind != "NoneType"
        }
        if given and kinds and ("Literal" in what or "Union" in what):
            return f"--{name} is {given[1] or given[2]}, but must be {' or '.join(sorted(kinds))}."
        return f"--{match[1]}: " + " ".join(what.split())
    return message


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
        print(result)
    if control is not None and control.signum is not None and getattr(result, "reason", "stopped") == "stopped":
        return 128 + control.signum
    return 0
