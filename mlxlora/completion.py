"""Shell completion: a script for bash, zsh or fish, made of the verbs and their parsers, so it never falls behind."""

from __future__ import annotations

import importlib
import shlex
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin

from mlxlora.cli import VERBS
from mlxlora.flags import build_parser

Shell = Literal["bash", "zsh", "fish"]
INSTALL: dict[str, str] = {
    "bash": 'eval "$(mlxlora completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(mlxlora completion zsh)"   # in ~/.zshrc, after compinit',
    "fish": "mlxlora completion fish > ~/.config/fish/completions/mlxlora.fish",
}


class Flag(NamedTuple):
    """One flag, and the values that it takes where they are few; without a name, what follows the verb itself."""

    name: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Completion:
    """The script."""

    shell: Shell
    script: str

    def __str__(self) -> str:
        return self.script


def completion(shell: Shell) -> Completion:
    """Print what makes a shell complete verbs, flags and their values.

    Args:
        shell: bash, zsh or fish
    """
    verbs = {name: flags_of(name) for name in VERBS}
    make = {"bash": bash, "zsh": zsh, "fish": fish}[shell]
    return Completion(shell, make(verbs, f"# mlxlora completion for {shell}: {INSTALL[shell]}"))


def flags_of(name: str) -> list[Flag]:
    """The flags of a verb, in the order of its help."""
    verb = VERBS[name]
    module, _, attribute = verb.function.partition(":")
    parser = build_parser(getattr(importlib.import_module(module), attribute), verb.positional)
    flags = [
        Flag(option.removesuffix("_"), choices_of(action))
        for option, action in parser._option_string_actions.items()
        if option.startswith("--") and not option.endswith("+") and "[" not in option
    ]
    groups = {
        flag.name.partition(".")[0] for flag in flags if "." in flag.name
    }  # `--adapter` itself takes no one value
    bare = [
        Flag("", choices_of(action)) for action in parser._actions if not action.option_strings and choices_of(action)
    ]
    return [*bare, *(flag for flag in flags if flag.name not in groups), Flag("--traceback", ())]


def choices_of(action: Any) -> tuple[str, ...]:
    """The values of a flag, where its type lists them."""

    def literals(kind: Any) -> list[str]:
        if get_origin(kind) is Literal:
            return [str(value) for value in get_args(kind)]
        if kind is bool:
            return ["true", "false"]
        return [text for part in get_args(kind) for text in literals(part)]

    return tuple(dict.fromkeys(literals(getattr(action, "_typehint", None))))


def words(values: Any) -> str:
    """Values as one quoted word of the shell, spaces between them."""
    return shlex.quote(" ".join(values))


def branches(verbs: dict[str, list[Flag]]) -> dict[str, list[str]]:
    """First word → second words, for verbs of two words."""
    found: dict[str, list[str]] = {}
    for name in verbs:
        first, _, second = name.partition(" ")
        if second:
            found.setdefault(first, []).append(second)
    return found


def cases(verbs: dict[str, list[Flag]]) -> str:
    """The table of bash and zsh: `$verb` to `flags`, and `$verb $previous` to `values`."""
    lines = ['case "$verb" in']
    lines += [
        f"  {shlex.quote(name)}) flags={words(flag.name for flag in flags if flag.name)} ;;"
        for name, flags in verbs.items()
    ]
    lines += ["esac", 'case "$verb $previous" in']
    for name, flags in verbs.items():
        for flag in flags:
            if flag.choices:
                before = flag.name or name.split()[-1]
                lines.append(f"  {shlex.quote(f'{name} {before}')}) values={words(flag.choices)} ;;")
    return "\n".join(f"  {line}" for line in [*lines, "esac"])


def first_words(verbs: dict[str, list[Flag]]) -> list[str]:
    """What can stand first, each once."""
    return list(dict.fromkeys(name.partition(" ")[0] for name in verbs))


def seconds(verbs: dict[str, list[Flag]]) -> str:
    """The second words of verbs that have two, as a `case` on the first."""
    lines = [f"    {shlex.quote(first)}) second={words(names)} ;;" for first, names in branches(verbs).items()]
    return "\n".join(['  case "$verb" in', *lines, "  esac"])


def bash(verbs: dict[str, list[Flag]], about: str) -> str:
    """Works in the bash 3.2 of macOS: no associative arrays. Paths are readline's own, which knows how to quote."""
    return f"""{about}
_mlxlora() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
  local verb="${{COMP_WORDS[1]}}" flags="" values="" second=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W {words(first_words(verbs))} -- "$current"))
    return
  fi
{seconds(verbs)}
  if [ -n "$second" ]; then
    if [ "$COMP_CWORD" -eq 2 ]; then
      COMPREPLY=($(compgen -W "$second" -- "$current"))
      return
    fi
    verb="$verb ${{COMP_WORDS[2]}}"
  fi
{cases(verbs)}
  if [ -n "$values" ]; then
    COMPREPLY=($(compgen -W "$values" -- "$current"))
  elif [ "${{current#-}}" != "$current" ]; then
    COMPREPLY=($(compgen -W "$flags" -- "$current"))
  fi
}}
complete -o default -F _mlxlora mlxlora
"""


def zsh(verbs: dict[str, list[Flag]], about: str) -> str:
    """For `eval`, and as a file in `fpath`, whose first line says what it is for; `${=…}` splits a string."""
    return f"""#compdef mlxlora
{about}
_mlxlora() {{
  local verb="${{words[2]}}" previous="${{words[CURRENT-1]}}" flags="" values="" second=""
  if (( CURRENT == 2 )); then
    compadd -- {" ".join(map(shlex.quote, first_words(verbs)))}
    return
  fi
{seconds(verbs)}
  if [[ -n "$second" ]]; then
    if (( CURRENT == 3 )); then
      compadd -- ${{=second}}
      return
    fi
    verb="$verb ${{words[3]}}"
  fi
{cases(verbs)}
  if [[ -n "$values" ]]; then
    compadd -- ${{=values}}
  elif [[ "${{words[CURRENT]}}" == -* ]]; then
    compadd -- ${{=flags}}
  else
    _files
  fi
}}
if [ "${{funcstack[1]}}" = _mlxlora ]; then
  _mlxlora "$@"  # read from a file at the first Tab: that file was this function until now
else
  compdef _mlxlora mlxlora
fi
"""


def fish(verbs: dict[str, list[Flag]], about: str) -> str:
    """One `complete` for each verb and flag, where the line begins with the words of that verb."""
    lines = [
        about,
        "function __mlxlora_begins -a words -d 'whether the line begins so; with a second word, with nothing more'",
        "  set -l typed (commandline -opc)[2..-1]",
        "  set -l wanted (string split -n ' ' -- $words)",
        "  set -l many (count $wanted)",
        '  test -z "$argv[2]"; or test (count $typed) -eq $many; or return 1',
        '  test $many -eq 0; or test "$typed[1..$many]" = "$wanted"',
        "end",
        "complete -c mlxlora -e",
    ]
    lines += [
        f"complete -c mlxlora -n \"__mlxlora_begins '' alone\" -f -a {shlex.quote(first)}"
        for first in first_words(verbs)
    ]
    for first, names in branches(verbs).items():
        lines.append(f"complete -c mlxlora -n '__mlxlora_begins {first} alone' -f -a {words(names)}")
    for name, flags in verbs.items():
        here = f'"__mlxlora_begins {shlex.quote(name)}'
        for flag in flags:
            values = f" -x -a {words(flag.choices)}" if flag.choices else ""
            if flag.name:
                lines.append(f'complete -c mlxlora -n {here}" -l {flag.name[2:]}{values}')
            else:
                lines.append(f'complete -c mlxlora -n {here} alone" -f -a {words(flag.choices)}')
    return "\n".join(lines) + "\n"
