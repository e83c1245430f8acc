"""What the pages say can be done: commands are understood, snippets of Python run, links lead somewhere."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mlxlora import cli, flags

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "convert" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@functools.cache
def parser_of(name: str) -> Any:
    verb = cli.VERBS[name]
    module, _, attribute = verb.function.partition(":")
    return flags.build_parser(getattr(importlib.import_module(module), attribute), verb.positional)


@functools.cache
def options(name: str) -> set[str]:
    """Every flag of a verb: those of option groups that may be left out (`--gguf.type`), and the groups themselves."""
    found = {f"--{option.removesuffix('_')}" for option in flags.options(parser_of(name))}
    return found | {flag.rpartition(".")[0] for flag in found if "." in flag}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z_]*(?:\.[a-z][a-z_]*)*", text))


def shown(text: str) -> list[str]:
    """Commands that stand on a line of their own, in a block."""
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.S) + re.findall(r"(?:^    .*\n)+", text, re.M)
    return [line for block in blocks for line in re.findall(r"^ *(mlxlora [a-z].*)$", block, re.M)]


def mentioned(text: str) -> list[str]:
    """Commands inside of a sentence."""
    return re.findall(r"(?<!`)`(mlxlora [^`]*)`(?!`)", re.sub(r"\n *", " ", text))


@pytest.mark.parametrize("page", NAMES)
def test_commands_are_understood(page: str) -> None:
    for command in shown((ROOT / page).read_text(encoding="utf-8")):
        if "…" in command:
            continue
        words = re.split(r"\s[|>]\s", command)[0]
        name, rest = cli.find_verb(shlex.split(words, comments=True)[1:])
        if "--config" not in rest:
            flags.parse(parser_of(name), flags.normalise(parser_of(name), rest))


@pytest.mark.parametrize("page", NAMES)
def test_options_that_are_mentioned_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for command in mentioned(text):
        words = shlex.split(command)[1:]
        if not words[0].startswith("-"):
            name, rest = cli.find_verb(words)
            assert not flags_in(" ".join(rest)) - options(name), f"{page}: {command}"
    everywhere = {"--traceback", "--version"}.union(*map(options, cli.VERBS))
    assert not {flag for code in re.findall(r"`(--[^`]*)`", text) for flag in flags_in(code)} - everywhere, page


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    missing = [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()]
    assert not missing, f"{page} points to {missing}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, look = set(), [ROOT / "README.md"]
    while look:
        page = look.pop()
        if page not in reached:
            reached.add(page)
            targets = re.findall(r"\]\(([^)#:]+\.md)", page.read_text(encoding="utf-8"))
            look += [(page.parent / target).resolve() for target in targets]
    assert set(PAGES) - reached == set()


def test_every_verb_has_a_page() -> None:
    pages = {page.stem for page in PAGES}
    assert {name.split()[0] for name in cli.VERBS} <= pages
