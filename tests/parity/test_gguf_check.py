"""The check that is made before a GGUF file is published: it passes what is right and sees what is wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxlora_convert import gguf_check, gguf_tensors
from mlxlora_convert.gguf_file import export_gguf
from mlxlora_convert.probe import ReadBack
from tests import tiny

pytestmark = pytest.mark.parity
pytest.importorskip("xllamacpp", reason="pip install xllamacpp")


class Given:
    """A probe with given answers."""

    def __init__(self, tokens: list[int], log_probs: Any) -> None:
        self.tokens, self.log_probs = tokens, log_probs

    def compare(self, reader: str, theirs: Any, bound: float) -> ReadBack:
        return ReadBack(reader, len(self.tokens), float(np.abs(self.log_probs - theirs).max()), bound)


@pytest.mark.parametrize("top", [2000, 20])
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_right_and_wrong_files(tmp_path: Path, kind: Any, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxlora.model import load_network
    from mlxlora_convert.probe import log_probs

    monkeypatch.setattr(gguf_check, "TOP", top)  # as with a vocabulary that is too large to be compared whole
    directory = tiny.model_directory(tmp_path / "model", "llama")
    tokens = [(37 * i + 11) % tiny.VOCABULARY for i in range(16)]
    probe: Any = Given(tokens, log_probs(load_network(directory)[0], tokens))
    right = gguf_check.compare(export_gguf(directory, tmp_path / "right.gguf", type=kind).path, probe, kind)
    assert right.difference <= right.bound / 2
    with monkeypatch.context() as patch:
        patch.setattr(gguf_tensors, "rotary_order", lambda head, backwards: np.arange(head))
        wrong = gguf_check.compare(export_gguf(directory, tmp_path / "wrong.gguf", type=kind).path, probe, kind)
    assert wrong.difference > wrong.bound
