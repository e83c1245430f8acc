"""A run whose directory is taken away while it trains."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlxlora.errors import TrainingError
from mlxlora.finetune import finetune
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Event, Step, Validation
from tests import tiny


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("when", [Step, Validation])
def test_nothing_is_made_where_it_stood(when: type[Event], renamed: bool, tmp_path: Path) -> None:
    """Not a part of a run without its run.json, which no command would take."""
    tiny.model_directory(tmp_path / "model", "llama")
    rows = tiny.chats(tmp_path / "rows.jsonl", 20)
    out = tmp_path / "runs" / "one"

    def take_away(event: Event) -> None:
        if isinstance(event, when) and event.step == 2 and out.exists():
            out.rename(tmp_path / "elsewhere") if renamed else shutil.rmtree(out.parent)

    training = TrainingConfig(steps=4, save_every=1, validate_every=2, sample_every=0)
    with pytest.raises(TrainingError, match="removed or renamed"):
        finetune(str(tmp_path / "model"), [str(rows)], out, training=training, on_event=take_away)
    assert not out.exists() and out.parent.exists() is renamed
    if renamed:
        assert (tmp_path / "elsewhere" / "run.json").is_file()
