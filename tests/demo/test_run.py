"""The whole way, on the embedded model: convert, score, train, score, fuse, quantize, answer."""

import json
from pathlib import Path

import pytest

from mlxlora.demo.run import MARKER, DemoResult, demo
from mlxlora.errors import InputError


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """A shortened demo: fewer chats, fewer questions."""
    out = tmp_path_factory.mktemp("demo") / "run"
    out.mkdir()
    (out / MARKER).write_text("{}")
    (out / "left-over").write_text("of an earlier demo")
    return demo(out, questions=40, samples=320)


def test_the_adapter_learns_what_the_base_cannot_do(ran: DemoResult) -> None:
    base, adapter, fused, packed = ran.stages
    assert base.accuracy <= 0.05
    assert adapter.accuracy >= 0.9
    assert abs(fused.right - adapter.right) <= 1
    assert abs(packed.right - fused.right) <= 4
    assert all(stage.asked == 40 for stage in ran.stages)


def test_the_quantized_model_is_smaller(ran: DemoResult) -> None:
    base, adapter, fused, packed = ran.stages
    assert packed.bytes < 0.4 * fused.bytes
    assert adapter.bytes < 0.5 * base.bytes


def test_the_answer_shown_was_wrong_before_and_runs_now(ran: DemoResult) -> None:
    assert "SELECT" not in ran.before and ran.after.startswith("SELECT")
    assert ran.rows.startswith("[")


def test_what_it_leaves_behind(ran: DemoResult) -> None:
    assert {path.name for path in ran.out.iterdir()} >= {"data", "base", "run", "fused", "deployed", MARKER}
    assert not (ran.out / "left-over").exists()
    rows = [json.loads(line) for line in (ran.out / "data" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 320
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]


def test_the_result_reads_as_a_table(ran: DemoResult) -> None:
    text = str(ran)
    for words in ("base", "adapter", "8 bits", "before:", "after:", "mlxlora chat"):
        assert words in text
    assert f"{ran.stages[1].accuracy:.1%}" in text


def test_nobody_elses_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("two years of work")
    with pytest.raises(InputError, match="something else than an earlier demo"):
        demo(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
