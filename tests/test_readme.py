"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from mlxlora import cli
from mlxlora.demo.run import demo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"<!-- run -->\n```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("mlxlora ")
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


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


def test_the_python_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place / "python"
    folder.mkdir()
    (folder / "demo-run").symlink_to(place / "demo-run")
    monkeypatch.chdir(folder)
    assert len(PYTHON) == 1
    (folder / "shown.py").write_text(PYTHON[0].replace("steps=40", "steps=2"))
    names = runpy.run_path("shown.py")
    assert [adapter.scale for adapter in names["model"].adapters] == [0.8]


@pytest.mark.parametrize("name", ["sft_chat", "qlora_callback", "several_adapters"])
def test_examples_run(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    module["main"](tmp_path / "out", steps=3)
    printed = capsys.readouterr().out
    assert "adapter:" in printed or "left: one" in printed
