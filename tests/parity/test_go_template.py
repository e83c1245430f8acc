"""Templates for Ollama rendered by Go's own text/template: what Jinja writes, and what our reading of Go says."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxlora_convert import go_template
from mlxlora_convert.ollama_template import render, translate
from tests.convert.test_ollama import DATE, LANGUAGE, TEMPLATES, VALUES, VARIABLES, translated

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(shutil.which("go") is None, reason="needs a Go toolchain: apt-get install golang-go"),
]
PROGRAM = Path(__file__).with_name("go_template.go")
Go = Callable[[list[dict[str, Any]]], list[dict[str, str]]]
LONGER = [
    [("system", "S"), ("system", "T"), ("user", "One?"), ("user", "Two?"), ("assistant", "1"), ("user", "3?")],
    [("user", "  spaces \n"), ("assistant", "<b>&amp; {{ .System }} }}"), ("user", "\u00a0Ünï «x» \t")],
]


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Go:
    program = tmp_path_factory.mktemp("go") / "go_template"
    subprocess.run(["go", "build", "-o", str(program), str(PROGRAM)], check=True, timeout=300)

    def ask(requests: list[dict[str, Any]]) -> list[dict[str, str]]:
        done = subprocess.run([str(program)], input=json.dumps(requests).encode(), capture_output=True, check=True)
        answers: list[dict[str, str]] = json.loads(done.stdout)
        return answers

    return ask


@pytest.mark.parametrize("bos", ["", "<s>"])
def test_go_itself_writes_what_jinja_writes(go: Go, bos: str) -> None:
    requests, expected = [], []
    for name in TEMPLATES:
        for text, messages, wanted in translated(name, bos):
            requests.append({"source": text, "messages": messages})
            expected.append((name, wanted))
    answers = go(requests)
    assert len(answers) > 3 * len(TEMPLATES)
    for (name, wanted), answer in zip(expected, answers, strict=True):
        assert answer == {"text": wanted, "error": ""}, name


def test_our_reading_of_a_conversation_is_theirs(go: Go) -> None:
    """Messages of one role in a row, odd spaces, braces: whatever the template makes of them."""
    requests: list[dict[str, Any]] = [
        {"source": translate(source, VARIABLES, date=DATE)[0], "messages": [{"role": r, "content": c} for r, c in one]}
        for source in TEMPLATES.values()
        for one in LONGER
    ]
    ours = [render(asked["source"], asked["messages"]) for asked in requests]
    assert [answer["text"] for answer in go(requests)] == ours


def made_up(draw: random.Random, depth: int = 0) -> str:
    """A template out of all that our reading knows, and some that it refuses."""
    value = draw.choice(
        [".A", ".B", ".C", ".N", "$.A", '"x"', r'"a\n\"{"', "1", "true", "$i", ".", "len .L", "slice .L 1", "not .B",
         'eq .A "y" "z"', 'ne .A "y"', "and .A .B", "or .C (not .B)", "eq .N 1", "eq .A 1", ".Missing", "len .A"]
    )  # fmt: skip
    left, right = draw.choice(["{{ ", "{{- ", "{{"]), draw.choice([" }}", " -}}", "}}"])
    if depth > 2 or draw.random() < 0.4:
        return f"{left}{value}{right}"
    inside = made_up(draw, depth + 1)
    spaces = draw.choice(["", " ", "\n ", "\u00a0", "a }} b", "{ ", " \t"])
    return draw.choice(
        [
            f"{spaces}{left}if {value}{right}{inside}{spaces}{left}else{right}{spaces}e{{{{ end }}}}",
            f"{left}if {value}{right}1{left}else if .B{right}{spaces}{inside}{{{{ end }}}}",
            f"{left}range $i, $x := .L{right}{spaces}{inside}{{{{ $x }}}}{{{{ . }}}}{left}end{right}",
            f"{left}range slice .L 2{right}{inside}{left}else{right}none{{{{ end }}}}",
            f"{{{{ $i := {value} }}}}{spaces}{inside}{{{{ $i = .A }}}}{spaces}{{{{ $i }}}}",
            f"{inside}{spaces}{made_up(draw, depth + 1)}",
        ]
    )


def test_our_reading_of_the_language_is_theirs(go: Go) -> None:
    """What it renders, Go renders alike. It may refuse what Go does not."""
    draw = random.Random(5)
    sources = [source for source, _ in LANGUAGE] + [made_up(draw) for _ in range(3000)]
    answers = go([{"source": source, "data": VALUES} for source in sources])
    compared = 0
    for source, answer in zip(sources, answers, strict=True):
        try:
            ours = go_template.render(source, VALUES)
        except go_template.GoTemplateError:
            continue
        assert answer == {"text": ours, "error": ""}, source
        compared += 1
    assert compared > 1000
