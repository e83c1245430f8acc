"""The words of a command line as the arguments of a function, whose signature says which there are.

In a module of its own, which `cli` imports late: jsonargparse takes a while.
"""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import docstring_parser  # what jsonargparse reads docstrings with, too
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from mlxlora.errors import ConfigError, MlxLoraError, nearest
from mlxlora.files import read_yaml

SUPPLIED = ("control",)  # parameters that the command line fills in by itself, beside every `on_…`


def build_parser(function: Callable[..., Any], positional: Sequence[str] = ()) -> ArgumentParser:
    """The flags of a function, from its signature and docstring; parameters in `positional` stand without a flag."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parameters = inspect.signature(function).parameters
    supplied = {parameter for parameter in parameters if parameter.startswith("on_") or parameter in SUPPLIED}
    # no abbreviations: an option that a later version adds must not change what a command means
    parser = ArgumentParser(exit_on_error=False, print_config=None, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file with the same tree of options")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    about = {each.arg_name: each.description for each in docstring_parser.parse(function.__doc__ or "").params}
    hints = inspect.get_annotations(function, eval_str=True) if positional else {}
    for parameter in positional:
        if "list" in str(hints[parameter]):
            parser.add_argument(parameter, type=str, nargs="+", help=about.get(parameter))
        else:
            parser.add_argument(parameter, type=hints[parameter], help=about.get(parameter))
    parser.add_function_arguments(function, skip={*supplied, *positional}, fail_untyped=True)
    return parser


def normalise(parser: ArgumentParser, words: list[str]) -> list[str]:
    """Spell the flags as the parser wants them, each with its value: `--flag=value`.

    `--max-length` becomes `--max_length`; a switch needs no value; a list takes several values and several flags.
    Raises ConfigError for a value that is missing, or empty where nothing cannot be meant.
    """
    actions = parser._option_string_actions
    bare = [action.dest.upper() for action in parser._actions if not action.option_strings]
    several = any(action.nargs == "+" for action in parser._actions if not action.option_strings)
    result: list[str] = []
    lists: dict[tuple[str, str], list[str]] = {}
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("--"):
            if word == "":
                raise ConfigError(f"{' '.join(bare) or 'A word'} is empty. Give a value.")
            result.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in actions:
            flag = "--" + flag[2:].replace("-", "_")
        if flag not in actions and f"{flag}_" in actions:  # a parameter that Python will not have by that name
            flag += "_"
        action = actions.get(flag)
        kind = kind_of(action) if action is not None else kind_below(flag, actions)
        if action.nargs == 0 if action is not None else not kind:  # --json; unknown
            result.append(flag + equals + value)
            continue
        given = [value] if equals else []
        while not equals and index < len(words) and not words[index].startswith("--"):
            wanted = several or sum(not one.startswith("--") for one in result) < len(bare)
            if kind == "<class 'bool'>" and wanted and words[index].lower() not in ("true", "false"):
                break  # a switch; what follows stands without a flag
            given.append(words[index])
            index += 1
            if "list[" not in kind.lower():
                break
        if not given and kind == "<class 'bool'>":
            given = ["true"]
        below = [f"{flag}.{field.name}" for field in fields_of(action)]
        check_given(flag, given, kind, below or [name for name in actions if name.startswith(f"{flag}.")])
        if "list[" in kind.lower():
            lists.setdefault((flag, kind), []).extend(given)
        elif action is None and kind == "<class 'str'>":  # by itself it would be read as YAML: `# Rules`, `a: b`
            group, _, field = flag.partition(".")
            result.append(f"{group}={quoted({field: given[0]})}")
        else:
            result.append(f"{flag}={given[0]}")
    return [*result, *(f"{flag}={joined(values, kind)}" for (flag, kind), values in lists.items())]


def check_given(flag: str, values: list[str], kind: str, group: list[str]) -> None:
    """Raise ConfigError for a flag without a value, with an empty one, or for a group of options as if it were one."""
    if group:
        named = ", ".join(group[:4])
        raise ConfigError(f"{flag} is a group of options. Give them one by one ({named}, …), or all by --config FILE.")
    if not values:
        raise ConfigError(f"{flag} needs a value.")
    # as of an unset variable of the shell; as a path it would mean the current directory
    if "" in values and kind != "<class 'str'>":
        wanted = "a path" if "Path" in kind else meant(kind)
        raise ConfigError(f"{flag} is empty. Give {wanted}{', or leave it out' if 'None' in kind else ''}.")


def joined(values: list[str], kind: str) -> str:
    """The values of a list as YAML."""
    whole = values[0][:1] + values[0][-1:] == "[]" or "Union" in kind  # where a number may also mean itself
    if len(values) == 1 and whole:
        return values[0]
    if "[str]" not in kind:
        return f"[{','.join(values)}]"
    return quoted(values)


def quoted(values: Any) -> str:
    """Texts as one line of YAML that says nothing else."""
    written: str = yaml.safe_dump(values, default_style='"', default_flow_style=True, width=10**9, allow_unicode=True)
    return written.rstrip("\n")


TEXTS = ("typing.Optional[str]", "str | None", "typing.Optional[pathlib.Path]", "pathlib.Path | None")


def options(parser: ArgumentParser) -> list[str]:
    """The names of all options, those of groups that may be left out (`gguf.type`) among them."""
    found = [flag.lstrip("-").removesuffix("_") for flag in parser._option_string_actions if not flag.endswith("+")]
    return found + [f"{action.dest}.{field.name}" for action in parser._actions for field in fields_of(action)]


def group_of(action: Any) -> type[Any] | None:
    """The dataclass behind a group of options that may be left out."""
    kinds = get_args(getattr(action, "_typehint", None))
    return next((kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)), None)


def fields_of(action: Any) -> tuple[Field[Any], ...]:
    """The options of such a group; none for any other flag."""
    group = group_of(action)
    return fields(group) if group is not None else ()


def kind_of(action: Any) -> str:
    """The annotation behind a flag, as text."""
    return str(getattr(action, "_typehint", ""))


def kind_below(flag: str, actions: dict[str, Any]) -> str:
    """The same for an option of a group that may be left out (`--gguf.type`); empty where it is of no such group.

    Raises ConfigError for an option that the group does not have.
    """
    name, _, field = flag.partition(".")
    group = group_of(actions.get(name))
    if group is None:
        return ""
    kinds = get_type_hints(group)
    if field not in kinds:
        raise ConfigError(f"unknown option {flag}.{nearest(flag[2:], [f'{name[2:]}.{known}' for known in kinds])}")
    return str(kinds[field])


def parse(parser: ArgumentParser, words: list[str]) -> dict[str, Any]:
    """The arguments of the function. Raises ConfigError for anything that the parser does not take."""
    known = options(parser)
    check_config_files(words, {name.partition(".")[0] for name in known if "." in name})
    try:
        given = parser.parse_args(words)
        for word in words:  # texts that YAML reads as no value at all, such as `# Rules` or `~`
            flag, _, text = word.partition("=")
            action = parser._option_string_actions.get(flag)
            kind = kind_of(action)
            if action is not None and kind in TEXTS and text not in ("", "null") and given[action.dest] is None:
                given[action.dest] = Path(text) if "Path" in kind else text
        return dict(vars(parser.instantiate(given)))
    except ArgumentError as error:
        bare = [action.dest for action in parser._actions if not action.option_strings]
        raise ConfigError(explain(str(error), known, bare)) from None
    except ValueError as error:  # jsonargparse's own, around what the dataclass of a group said of its values
        raise own_words(error) from None


def own_words(error: Exception) -> Exception:
    """Our own error among the causes of another one; that one itself where there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MlxLoraError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def check_config_files(words: list[str], groups: set[str]) -> None:
    """Read every --config file with our own careful reader first: safe YAML, no key twice, mappings for all groups."""
    for word in words:
        flag, _, path = word.partition("=")
        if flag != "--config":
            continue
        content = read_yaml(Path(path))
        if not isinstance(content, dict):
            raise ConfigError(f"{path} does not hold options by name. Write lines such as `model: DIR`.")
        for name in sorted(groups & content.keys()):
            if not isinstance(content[name], dict):
                raise ConfigError(f"{path}: {name} holds options by name, not {content[name]!r}.")


KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "Path": "a path",
    "list": "a list such as [1, 2]",
    "List": "a list such as [1, 2]",
    "dict": "names with values, such as '{name: value}'",
    "tuple": "two numbers such as [0.9, 0.99]",
    "Tuple": "two numbers such as [0.9, 0.99]",
}


def meant(kind: str) -> str:
    """What an annotation asks for, in words."""
    if choices := re.search(r"Literal\[(.*?)\]", kind):
        return among(choices[1])
    found = re.search(r"\b(list|tuple|dict|int|float|bool)\b", kind)
    return KINDS[found[1]] if found else "a value"


def among(choices: str) -> str:
    """The names of a Literal, in words."""
    names = choices.replace("'", "")
    return f"one of {names}" if "," in names else names


def explain(message: str, known: list[str], bare: list[str]) -> str:
    """jsonargparse's message, with the nearest known option beside an unknown one. `bare` stand without a flag."""
    if match := re.match(r"unrecognized arguments: ([^-].*)", message):
        return f"unexpected: {match[1]}. Values stand after their --option; quote one that holds spaces."
    if match := re.match(r"unrecognized arguments: (?:--)?([\w.+-]+)", message):
        name = match[1]
        if name in bare:
            return f"--{name}: {name.upper()} stands without a flag before it here."
        return f"unknown option --{name}.{nearest(name, known)}"
    if match := re.search(r"Group '(\S+)' does not accept option '(\S+)'", message):
        name = f"{match[1]}.{match[2]}"
        return f"unknown option {name}.{nearest(name, known)}"
    if match := re.search(r"(?:Key|Option) '(\S+)' is not (?:expected|accepted)", message):
        if group := re.match(r'Parser key "([\w.]+)"', message):
            name = f"{group[1]}.{match[1]}"
            return f"unknown option --{name}.{nearest(name, known)}"
        return f"unknown option {match[1]}.{nearest(match[1], known)}"
    if match := re.match(r"the following arguments are required: (.*)", message):
        return "missing: " + ", ".join(
            f"--{name}" if name in known else name.upper() for name in match[1].replace(",", " ").split()
        )
    if match := re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.S):
        return explain_value(match, known)
    return message


def explain_value(match: re.Match[str], known: list[str]) -> str:
    """What a value is, and what it must be."""
    what = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", match[2]).replace("typing.", "")
    inner = re.search(r'Parser key "(\w+)"', what)  # the field of a group that may also be left out
    name = f"{match[1]}.{inner[1]}" if inner else match[1]
    given = re.search(r"(?:Got|Given) value: ?(.*)", what)
    kinds = {
        among(choices) if kind == "Literal" else KINDS[kind]
        for kind, choices in re.findall(r"Expected an? (\w+)(?:\[(.*?)\])?", what)
        if kind == "Literal" or kind in KINDS
    }
    if nested := re.search(r"Got value: NestedArg\(key='([\w.]+)'", what):
        return f"unknown option --{name}.{nested[1]}."
    if given and kinds:
        shown = f"--{name}" if name in known else name.upper()
        return f"{shown} is {given[1].strip() or 'empty'}, but must be {' or '.join(sorted(kinds))}."
    return f"--{match[1]}: " + " ".join(what.split())
