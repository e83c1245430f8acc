"""Completion: the scripts are valid, and bash offers what the parsers have."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxlora.cli import VERBS, main
from mlxlora.completion import completion, flags_of


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "mlxlora.bash"
    path.write_text(str(completion("bash")))
    return path


def offered(script: Path, *words: str) -> list[str]:
    line = " ".join(f"'{word}'" for word in ("mlxlora", *words))
    ask = f'source "{script}"; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _mlxlora; echo "${{COMPREPLY[*]}}"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_valid_and_knows_every_verb(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for name in VERBS:
        assert all(word in text for word in name.split())
    assert "optimizer.learning_rate" in text and "cosine-restarts" in text
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} here to read it")
    (tmp_path / "script").write_text(text)
    subprocess.run([program, "-n", str(tmp_path / "script")], check=True)


def test_bash_offers_verbs_flags_and_values(script: Path) -> None:
    assert offered(script, "co") == ["convert", "compare", "completion"]
    assert offered(script, "data", "") == ["check", "convert"]
    assert offered(script, "data", "convert", "--ou") == ["--out"]
    assert offered(script, "train", "--optimizer.learning") == ["--optimizer.learning_rate"]
    assert offered(script, "train", "--optimizer.name", "a") == ["adamw", "adam", "adafactor"]
    assert offered(script, "completion", "") == ["bash", "zsh", "fish"] and "--for" in offered(script, "plan", "--f")


def offered_by_zsh(script: Path, *words: str) -> list[str]:
    """What zsh would offer: its builtin, which wants a terminal, is replaced by one that prints."""
    line = " ".join(f"'{word}'" for word in ("mlxlora", *words))
    ask = f"""compdef() {{}}; compadd() {{ shift; print -l -- "$@"; }}; _files() {{ print FILES; }}
        source "{script}"; words=({line}); CURRENT={len(words) + 1}; _mlxlora"""
    done = subprocess.run(["zsh", "-f", "-c", ask], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


def offered_by_fish(script: Path, *words: str) -> list[str]:
    ask = f"source '{script}'; complete -C 'mlxlora {' '.join(words)}'"
    done = subprocess.run(["fish", "--no-config", "-c", ask], capture_output=True, text=True, check=True)
    assert not done.stderr
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("shell", "offered"), [("zsh", offered_by_zsh), ("fish", offered_by_fish)])
def test_zsh_and_fish_offer_the_same(shell: str, offered: Callable[..., list[str]], tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    script = tmp_path / f"mlxlora.{shell}"
    script.write_text(str(completion(shell)))  # type: ignore[arg-type]
    assert set(offered(script, "")) == {name.split()[0] for name in VERBS}
    assert set(offered(script, "data", "")) == {"check", "convert"}
    assert "--optimizer.learning_rate" in offered(script, "train", "--")
    assert set(offered(script, "train", "--optimizer.schedule", "")) >= {"cosine", "linear"}
    assert set(offered(script, "completion", "")) >= {"bash", "zsh", "fish"}
    of_data = set(offered(script, "data", "convert", "--"))
    assert "--columns" in of_data and "--quantize.bits" not in of_data  # `convert` is a verb, too
    assert "--quantize.bits" in offered(script, "convert", "--")


def test_zsh_takes_it_from_its_search_path(tmp_path: Path) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("no zsh here")
    (tmp_path / "_mlxlora").write_text(str(completion("zsh")))
    ask = f"fpath=('{tmp_path}' $fpath); autoload -Uz compinit; compinit -u -D; print ${{_comps[mlxlora]}}"
    done = subprocess.run(["zsh", "-f", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "_mlxlora"


def typed(keys: str, script: Path, folder: Path) -> list[str]:
    """What the command is given after these keys, in a bash that somebody sits at, in `folder`."""
    terminal, inside = pty.openpty()
    settings = {"PS1": "READY>", "TERM": "dumb", "INPUTRC": "/dev/null", "HISTFILE": "/dev/null"}
    words = ["bash", "--norc", "--noprofile", "-i"]
    with subprocess.Popen(
        words, stdin=inside, stdout=inside, stderr=inside, cwd=folder, env={**os.environ, **settings},
        start_new_session=True,
    ):  # fmt: skip
        os.close(inside)
        for line in (f"source '{script}'; mlxlora() {{ printf '%s\\n' \"$@\" > told; }}", f"mlxlora {keys}", "exit"):
            said = b""
            while b"READY>" not in said:
                said += os.read(terminal, 1024)
            os.write(terminal, f"{line}\n".encode())
        with contextlib.suppress(OSError):  # where it ends, Linux says
            while os.read(terminal, 1024):
                pass
    os.close(terminal)
    return (folder / "told").read_text().splitlines()


def test_paths_where_nothing_else_is_known(script: Path, tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    (tmp_path / "it's rows.jsonl").touch()
    words = ["train", "--model", "my model/", "--data", "it's rows.jsonl", "--optimizer.name", "lion"]
    assert typed("train --model my\t --data it\t --optimizer.name li\t", script, tmp_path) == words


def test_flags_are_those_of_the_parser() -> None:
    names = [flag.name for flag in flags_of("train")]
    assert {"--model", "--data", "--gentle", "--config", "--json", "--help", "--traceback"} <= set(names)
    assert "--adapter" not in names and "--adapter.rank" in names and len(names) == len(set(names))


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2 and "SHELL is tcsh" in capsys.readouterr().err
