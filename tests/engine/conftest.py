"""The two kinds of machine that the engine tells apart."""

import pytest

from tests.machines import pretend_accelerator


@pytest.fixture(params=["CPU", "accelerator"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs twice: as on a CPU, and as on Metal and CUDA."""
    kind = str(request.param)
    if kind == "accelerator":
        pretend_accelerator(monkeypatch)
    return kind
