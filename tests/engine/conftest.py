"""The two kinds of machine that the engine tells apart."""

import sys

import pytest


@pytest.fixture(params=["CPU", "accelerator"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs twice: as on a CPU, and with all that the engine does on Metal and CUDA, computed here: fused
    attention, products in the weights' own kind of number. Steps stay uncompiled unless a test asks: on a CPU MLX
    would start a compiler for each of them."""
    import mlxlora.engine.engine  # noqa: F401  all that asks is loaded

    kind = str(request.param)
    if kind == "accelerator":
        asking = [module for name, module in sys.modules.items() if name.startswith("mlxlora.")]
        for module in asking:
            if hasattr(module, "on_cpu") and module.__name__ != "mlxlora.engine.config":
                monkeypatch.setattr(module, "on_cpu", lambda: False)
    return kind
