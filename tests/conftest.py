"""Shared by all tests: no network, no writing outside the test's own folder."""

import os
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Tokenised data goes where pytest clears up, be it after a run that was killed."""
    with pytest.MonkeyPatch.context() as patch:
        if "MLXLORA_CACHE" not in os.environ:
            patch.setenv("MLXLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def short_answers():
    """Every run looks at a few answers before and after; models that were never trained would ramble in all tests."""
    with pytest.MonkeyPatch.context() as patch:
        if answers := sys.modules.get("mlxlora.answers"):
            patch.setattr(answers, "TOKENS", 6)
        yield


@pytest.fixture
def stir():
    """`stir(network, config, seed, size)`: inject an adapter and move every learned array away from its start."""
    from tests.adapter_helpers import stir

    return stir


@pytest.fixture
def close():
    """`close(a, b, tolerance)`: two arrays agree, relative to the larger of 1 and the largest value."""
    import mlx.core as mx

    def check(a, b, tolerance=1e-5):
        assert a.shape == b.shape
        assert float(mx.abs(a - b).max()) <= tolerance * max(1.0, float(mx.abs(b).max()))

    return check
