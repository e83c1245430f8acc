"""A LoRA step on small models of mlx-lm's architectures gives the plain numbers: a few here, all with the marker."""

from __future__ import annotations

import pytest

from mlxlora import mlxlm
from tests.architectures.sweep import examine, in_process

FEW = ["afm7", "dbrx", "lfm2", "mamba2", "olmo2", "phimoe", "recurrent_gemma"]


@pytest.mark.parametrize("model_type", FEW)
def test_a_few(model_type: str) -> None:
    found = examine(model_type)
    assert found["state"] == "right", found


@pytest.mark.architectures
@pytest.mark.parametrize("model_type", mlxlm.model_types())
def test_all(model_type: str) -> None:
    assert in_process(model_type)["state"] in ("right", "not built", "not trainable")
