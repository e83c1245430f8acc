"""Shared by all tests: no network, no writing outside the test's own folder."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR"):  # what is said must not hang on who looks
    os.environ.pop(name, None)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Tokenised data goes where pytest clears up, be it after a run that was killed, and so does what others keep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        if "MLXLORA_CACHE" not in os.environ:
            patch.setenv("MLXLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def short_answers():
    """Every run looks at a few answers before and after; models that were never trained would ramble in all tests."""
    from mlxlora import answers

    with pytest.MonkeyPatch.context() as patch:
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


@pytest.fixture
def in_step():
    """Host and device in step, as far as MLX lets them be: else the peak hangs on which of two threads is quicker.

    On a CPU a host that goes ahead allocates up to a fifth more, and how far it goes changes with the machine's load.
    Beyond its memory limit MLX waits for what is under way before it allocates more.
    """
    import mlx.core as mx

    limit = mx.set_memory_limit(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "set_memory_limit", lambda _: limit)
        patch.setattr(mx, "async_eval", mx.eval)
        yield
    mx.set_memory_limit(limit)
