"""The command that a result names comes out of a shell as it went in, whatever paths are called."""

import re
import shlex
from pathlib import Path

from mlxlora.commands import command
from mlxlora.reporting.report import ReportResult

ROOT = Path(__file__).parent.parent
ODD = "My Models/it's; $(here)"


def test_words_survive_a_shell() -> None:
    said = command("data check", ODD, model=Path(ODD), data=("a b.jsonl", "c=0.5"))
    expected = ["mlxlora", "data", "check", ODD, "--model", ODD, "--data", "a b.jsonl", "c=0.5"]
    assert shlex.split(said) == expected


def test_what_needs_no_quotes_has_none() -> None:
    said = command("chat", model="org/name-4bit", adapter=["run=0.5", "./b"], out="DIR")
    assert said == "mlxlora chat --model org/name-4bit --adapter run=0.5 ./b --out DIR"


def test_a_result_with_odd_paths(tmp_path: Path) -> None:
    said = str(ReportResult(tmp_path / "report.html", [Path(ODD)], ODD)).rpartition("next: ")[2]
    assert shlex.split(said)[:6] == ["mlxlora", "compare", "--model", ODD, "--adapter", ODD]


def test_no_result_puts_one_together_by_hand() -> None:
    by_hand = re.compile(r"""f["'](next: )mlxlora [a-z ]+""")
    for room in ("mlxlora", "convert"):
        for file in (ROOT / room).rglob("*.py"):
            assert not by_hand.search(file.read_text()), file
