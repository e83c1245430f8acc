"""What README and the pages show runs as it stands there."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlxlora import cli
from mlxlora.demo.run import demo
from mlxlora.macs import mac

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "mlxlora" / "demo" / "model"
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"<!-- run -->\n```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("mlxlora ")
]
PYTHON = {
    page.relative_to(ROOT).as_posix(): block
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    if page.stem != "demo"  # what it shows is what `place` does
    and (block := "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)))
}
SHORTER = {"steps=40": "steps=2", "epochs=3": "steps=2"}

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "convert" / "README.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_that_is_shown_is_understood(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verbs, options and values, without running anything. What stands in a sentence may leave out what is required."""
    text = page.read_text(encoding="utf-8")
    given: dict[str, Any] = {}
    monkeypatch.setattr(cli, "execute", lambda function, arguments, as_json: given.update(arguments) or 0)
    code = "\n".join([*re.findall(r"```\w*\n(.*?)```", text, re.S), *re.findall(r"^    (.*)$", text, re.M)])
    lines = re.findall(r"^(mlxlora .*)$", code.replace("\\\n", " "), re.M)
    for command in [*lines, *re.findall(r"`(mlxlora [a-z][^`]*)`", text)]:
        given.clear()
        words = shlex.split(re.sub(r" > .*|…|--config ?\S*", "", command), comments=True)
        status = cli.main(words[1:])
        error = capsys.readouterr().err
        short = error.startswith("error: missing:") and (command not in lines or "--config" in command)
        assert status == 0 or short, f"{command}\n{error}"
        if given.get("for_") is not None:
            mac(given["for_"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a very short demo has run."""
    place = tmp_path_factory.mktemp("readme")
    demo(place / "demo-run", questions=2, samples=24)
    return place


def test_the_commands_run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    assert len(COMMANDS) >= 9
    for command in COMMANDS:
        code = cli.main(shlex.split(command)[1:])
        captured = capsys.readouterr()
        assert code == 0, f"{command}\n{captured.err}"
        assert captured.out.strip(), command
    assert (place / "my-run" / "report.html").is_file() and (place / "my-model.gguf").is_file()


@pytest.fixture
def folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the pages' names stand for what the demo left: models, adapters, rows."""
    demo_run, rows = place / "demo-run", (place / "demo-run" / "data" / "test.jsonl").read_text().splitlines(True)
    links = {"demo-run": demo_run, "Qwen/Qwen3-0.6B": MODEL}
    links |= dict.fromkeys(("DIR", "MODEL", "models/qwen3", "qwen3-4bit"), demo_run / "base")
    for name, target in links.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
    for name in ("run", "RUN", "RUN2", "RUN3", "other", "style", "runs/first"):
        shutil.copytree(demo_run / "run", tmp_path / name)
    for name in ("chats.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text("".join(rows[:8]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_runs(folder: Path, page: str) -> None:
    if page == "docs/convert.md":  # what a page makes must not be there
        (folder / "qwen3-4bit").unlink()
    if page == "docs/train.md":
        shutil.rmtree(folder / "RUN")
    code = PYTHON[page]
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    (folder / "shown.py").write_text(code)
    names = runpy.run_path("shown.py")
    if page == "README.md":
        assert [adapter.scale for adapter in names["model"].adapters] == [0.8]


@pytest.mark.parametrize("name", ["sft_chat", "qlora_callback", "several_adapters"])
def test_examples_run(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    module["main"](tmp_path / "out", steps=3)
    printed = capsys.readouterr().out
    assert "adapter:" in printed or "left: one" in printed
