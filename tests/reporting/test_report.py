"""The report: whole in one file, true to the metrics, safe against what a data set may contain, and it draws."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlxlora.errors import InputError
from mlxlora.reporting.report import report
from mlxlora.reporting.said import Said, said
from tests.patience import PATIENCE

HOSTILE = '</script><script>document.title="broken"</script><img src=x onerror=alert(1)>'


def make_run(path: Path, steps: int = 60, offset: float = 0.0, rank: int = 8) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(f"model: models/tiny\ndata: [chats.jsonl]\nadapter: {{rank: {rank}}}\n")
    (path / "run.json").write_text(json.dumps({"format": 1, "identity": {"model": "ab" * 32}, "finished": True}))
    events = [
        {"event": "data", "step": 0, "samples": 900, "validation_samples": 50, "tokens": 120_000,
         "trained_tokens": 40_000, "shortest": 12, "longest": 2_000, "histogram_edges": [0, 100, 200, 300],
         "histogram_counts": [400, 300, 150, 50]},
        {"event": "started", "step": 0, "steps": steps, "epochs": 2.0, "samples": 900, "trainable_parameters": 10_000,
         "total_parameters": 1_000_000, "predicted_peak": 2 * 10**9, "memory_limit": 8 * 10**9,
         "predicted_seconds": 40.0},
        {"event": "notice", "step": 0, "message": f"3 samples left out {HOSTILE}"},
        {"event": "samples", "step": 0, "prompts": ["How many?", HOSTILE], "answers": ["I see a table.", "?"]},
        {"event": "validation", "step": 0, "epoch": 0.0, "loss": 3.0, "tokens": 500, "best_loss": None, "best": False,
         "elapsed": 0.1},
    ]  # fmt: skip
    for step in range(1, steps + 1):
        loss = 3 * math.exp(-step / 20) + 0.5 + offset + 0.1 * math.sin(step * 7)
        events.append({
            "event": "step", "step": step, "steps": steps, "epoch": 2 * step / steps,
            "loss": None if step == 9 else loss,
            "learning_rate": 2e-4 * (1 - step / steps), "grad_norm": 1.0 / step, "tokens": step * 1_000,
            "tokens_per_second": 900 + step, "processed_per_second": 2_000, "samples": step * 8, "memory": 10**9,
            "peak_memory": 2 * 10**9 + step * 10**6, "elapsed": step * 0.5, "remaining": 1.0, "best_loss": None,
            "applied": step != 9,
        })  # fmt: skip
        if step % 20 == 0:
            events.append({"event": "validation", "step": step, "epoch": 1.0, "loss": loss + 0.1, "tokens": 500,
                           "best_loss": loss, "best": True, "elapsed": step * 0.5})  # fmt: skip
    events.append({"event": "samples", "step": steps, "prompts": ["How many?", HOSTILE],
                   "answers": ["SELECT count(*) FROM t", HOSTILE]})  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "st')
    return path


def test_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    result = report([run])
    text = result.report.read_text()
    assert result.report == run / "report.html"
    assert "validation loss before" in text and "3.0000" in text and "SELECT count(*) FROM t" in text
    assert "peak 2.0 GB of 8.0 GB, about 40 s" in text and "peak 2.1 GB, 30 s for 60 steps" in text
    assert HOSTILE not in text and "&lt;script&gt;document.title" in text
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)
    data = charts(text)
    titles = [chart["title"] for chart in data]
    assert len(titles) == 6 and titles[0].startswith("Loss")
    for chart in data:
        assert all(len(column) == len(chart["data"][0]) for column in chart["data"])
        assert len(chart["series"]) == len(chart["data"]) - 1


def test_several_runs_are_overlaid_and_their_differences_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=90, offset=0.3, rank=32)]
    monkeypatch.chdir(tmp_path)
    text = report(runs).report.read_text()
    assert "Settings that differ" in text and "adapter.rank" in text and "models/tiny" in text
    assert not re.search(r"<th>model</th><td>models/tiny</td></tr>", text)
    for chart in charts(text):  # a run is drawn in one colour, and in the same one everywhere
        colours = {line["label"].split()[0]: line["color"] for line in chart["series"]}
        assert colours == {"a": 0, "b": 1}
        assert all(line["color"] == colours[line["label"].split()[0]] for line in chart["series"])


def charts(text: str) -> list[dict[str, Any]]:
    found = re.search(r'id="charts">(.*?)</script>', text, re.S)
    assert found
    return list(json.loads(found[1]))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no run directory.*config\.yaml.*train --out"):
        report([tmp_path / "empty"])
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("width", [1200, 500])  # Chromium's windows are no narrower
def test_it_draws_in_a_browser_without_errors_or_network(tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    path = report([make_run(tmp_path / "run")]).report
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},2400", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom",
         path.as_uri()],
        capture_output=True, text=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    assert 'data-drawn="6"' in done.stdout and done.stdout.count("<canvas") == 6
    assert max(int(found) for found in re.findall(r'<canvas width="(\d+)"', done.stdout)) < width
    assert "<title>run" in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr


def test_what_was_said_before_and_after_is_told_apart() -> None:
    def look(step: int, answer: str) -> dict[str, Any]:
        return {"event": "samples", "step": step, "prompts": ["Who?"], "answers": [answer], "expected": ["I."]}

    assert said([]) == [] and said([{"event": "step", "step": 1}]) == []
    assert said([look(0, "a")]) == [Said("Who?", "I.", "a", None, None)]  # stopped before its end
    assert said([look(0, "a"), look(5, "b"), look(9, "c")]) == [Said("Who?", "I.", "a", "c", 9)]
    assert said([look(9, "c")]) == [Said("Who?", "I.", None, "c", 9)]  # nobody looked when it began
