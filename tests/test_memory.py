"""Sizes, limits that are undone, and what running out of memory says."""

import mlx.core as mx
import pytest

from mlxlora.doctor import hardware
from mlxlora.errors import ConfigError, TrainingError
from mlxlora.memory import limit_of, limited, parse_size, recommended


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12_000_000_000),
        ("1.5 gb", 1_500_000_000),
        ("16GiB", 2**34),
        ("900MB", 900_000_000),
        ("2000000", 2_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "12", "-1GB", "12 apples", "1e9", "0GB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="memory_limit"):
        parse_size(text)


def test_limits_hold_within_the_block_and_are_undone() -> None:
    before = mx.set_memory_limit(123_456_789)
    with limited(50_000_000):
        inside = mx.set_memory_limit(50_000_000)
        assert inside == 50_000_000
    assert mx.set_memory_limit(before) == 123_456_789
    assert limit_of(None) <= recommended()


def test_running_out_says_what_to_change() -> None:
    with pytest.raises(TrainingError, match=r"batch_size 1.*checkpoint_blocks"), limited(50_000_000):
        raise RuntimeError("[metal::malloc] Unable to allocate 10 bytes")
    with pytest.raises(TrainingError), limited(50_000_000):
        raise MemoryError
    with pytest.raises(RuntimeError, match="something else"), limited(50_000_000):
        raise RuntimeError("something else")


def test_a_mac_is_asked_about_its_gpu_even_where_mlx_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"device_name": "Apple M9", "max_recommended_working_set_size": 20_000_000_000}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(
        mx, "device_info", lambda device=mx.cpu: told if device == mx.gpu else {"architecture": "arm64"}
    )
    assert recommended() == 20_000_000_000
    assert hardware()[0::3] == ("Metal", 20_000_000_000)
    assert hardware()[1] == "Apple M9"
    with limited(50_000_000):
        pass
