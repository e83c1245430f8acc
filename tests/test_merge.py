"""Merging: sums are sums of the adapters' effects, cut ranks are the best, TIES and DARE as written out."""

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.adapters import Adapter, AdapterConfig, Adapters, Module, collect, read_adapter, remove, save_adapter
from mlxlora.errors import AdapterError, ConfigError, InputError, UnsupportedError
from mlxlora.merge import merge
from tests import tiny

TOKENS = mx.arange(3, 43)[None]


@pytest.fixture
def pair(tmp_path, stir):
    """Two adapters of different rank, scale and targets for one model."""

    def make(family="llama", kind="lora", base="a" * 64):
        network = tiny.network(family)
        first = AdapterConfig(type=kind, rank=4, alpha=8, targets=["all-linear"])
        second = AdapterConfig(type=kind, rank=3, alpha=9, targets=["attention", "output"])
        paths = []
        for number, config in enumerate((first, second)):
            stir(network, config, seed=number + 1)
            paths.append(save_adapter(tmp_path / f"a{number}", collect(network, base=base if number else "a" * 64)))
            remove(network)
        return network, *paths

    return make


def change(adapter, path):
    """The dense change of a module, [in, out]; experts first."""
    module = adapter.modules[path]
    a, b = np.array(module.arrays["lora_a"]), np.array(module.arrays["lora_b"])
    if a.ndim == 3:
        a, b = a.transpose(0, 2, 1), b.transpose(0, 2, 1)
    return module.scale * a @ b


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_the_sum_is_exact(pair, tmp_path, family, close):
    network, first, second = pair(family)
    result = merge([f"{first}=0.7", f"{second}=-0.4"], tmp_path / "out")
    assert (result.error, result.rank, result.adapters) == (0, 7, {"a0": 0.7, "a1": -0.4})
    assert "exact" in str(result)
    both = Adapters(network)
    both.add_spec(f"{first}=0.7")
    both.add_spec(f"{second}=-0.4")
    expected = network(TOKENS)
    both.clear()
    Adapters(network).add(tmp_path / "out")
    close(network(TOKENS), expected, 3e-5)


def test_an_adapter_and_its_negation_are_nothing(pair, tmp_path, close):
    network, first, _ = pair()
    base = network(TOKENS)
    merge([f"{first}", f"{first}=-1"], tmp_path / "out")
    Adapters(network).add(tmp_path / "out")
    close(network(TOKENS), base)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_lower_rank_is_the_best_one(pair, tmp_path, family):
    _, first, second = pair(family)
    result = merge([str(first), f"{second}=0.5"], tmp_path / "out", rank=2)
    merged, one, two = read_adapter(tmp_path / "out"), read_adapter(first), read_adapter(second)
    lost = whole = 0.0
    for path in merged.modules:
        parts = [weight * change(a, path) for a, weight in ((one, 1), (two, 0.5)) if path in a.modules]
        total = sum(parts)
        values = np.linalg.svd(total, compute_uv=False)
        best = np.square(values[..., 2:]).sum()
        got = np.square(total - change(merged, path)).sum()
        assert got == pytest.approx(best, rel=1e-3, abs=1e-6)
        lost, whole = lost + best, whole + np.square(total).sum()
        assert merged.modules[path].rank == 2
    assert result.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert 0 < result.error < result.worst_error < 1


def small(tmp_path, name, seed):
    """An adapter of one small module, of full rank, so that nothing is lost."""
    rng = np.random.default_rng(seed)
    arrays = {
        "lora_a": mx.array(rng.normal(size=(6, 4)).astype(np.float32)),
        "lora_b": mx.array(rng.normal(size=(4, 5)).astype(np.float32)),
    }
    adapter = Adapter("lora", {"x.proj": Module(arrays, 0.5)}, base="a" * 64)
    return save_adapter(tmp_path / name, adapter), change(adapter, "x.proj")


def test_ties(tmp_path):
    made = [small(tmp_path, f"t{seed}", seed) for seed in range(3)]
    weights = [1.0, 0.5, -0.7]
    specs = [f"{path}={weight}" for (path, _), weight in zip(made, weights, strict=True)]
    merge(specs, tmp_path / "out", method="ties", density=0.4, rank=5)
    expected = np.zeros((6, 5))
    edges = [np.sort(np.abs(delta).ravel())[-12] for _, delta in made]
    for i in range(6):
        for j in range(5):
            values = [
                weight * delta[i, j] if abs(delta[i, j]) >= edge else 0.0
                for (_, delta), weight, edge in zip(made, weights, edges, strict=True)
            ]
            sign = 1 if sum(values) >= 0 else -1
            agreeing = [value for value in values if value * sign > 0]
            expected[i, j] = np.mean(agreeing) if agreeing else 0.0
    np.testing.assert_allclose(change(read_adapter(tmp_path / "out"), "x.proj"), expected, atol=1e-5)


def test_dare(tmp_path):
    made = [small(tmp_path, f"d{seed}", seed) for seed in range(2)]
    specs = [f"{path}=0.5" for path, _ in made]
    draws = []
    for seed in range(60):
        merge(specs, tmp_path / f"out{seed}", method="dare", density=0.3, rank=5, seed=seed)
        draws.append(change(read_adapter(tmp_path / f"out{seed}"), "x.proj"))
    mean = 0.5 * (made[0][1] + made[1][1])
    spread = np.std(draws, axis=0) / len(draws) ** 0.5
    assert (np.abs(np.mean(draws, axis=0) - mean) < 5 * spread + 1e-3).all(), "right on average"
    one, two = (0.5 * delta / 0.3 for _, delta in made)
    possible = np.stack([np.zeros_like(one), one, two, one + two])
    assert np.abs(possible - draws[0]).min(axis=0).max() < 1e-4, "each entry is whole or gone"
    merge(specs, tmp_path / "again", method="dare", density=0.3, rank=5, seed=7)
    np.testing.assert_array_equal(change(read_adapter(tmp_path / "again"), "x.proj"), draws[7])


def test_a_rank_that_cannot_hold_ties_tells_its_error(pair, tmp_path):
    _, first, second = pair("mixtral")
    result = merge([str(first), str(second)], tmp_path / "out", method="ties", rank=4)
    assert 0 < result.error < 1
    assert "relative error" in str(result)
    merged, one, two = read_adapter(tmp_path / "out"), read_adapter(first), read_adapter(second)
    assert max(merged.ranks) <= 4
    exact = merge([str(first), str(second)], tmp_path / "full", method="ties", rank=64)
    assert exact.error < 1e-3
    whole = read_adapter(tmp_path / "full")
    path = next(path for path in merged.modules if path in one.modules and path in two.modules)
    total = change(whole, path)
    values = np.linalg.svd(total, compute_uv=False)
    lost = np.square(total - change(merged, path)).sum()
    assert lost == pytest.approx(np.square(values[..., 4:]).sum(), rel=0.02)


class TestRefusals:
    def test_other_kinds(self, pair, tmp_path):
        _, first, second = pair(kind="dora")
        with pytest.raises(UnsupportedError, match=r"a0 is dora.*mlxlora fuse"):
            merge([str(first), str(second)], tmp_path / "out")

    def test_other_bases(self, pair, tmp_path):
        _, first, second = pair(base="b" * 64)
        with pytest.raises(AdapterError, match="different models"):
            merge([str(first), str(second)], tmp_path / "out")
        merge([str(first), str(second)], tmp_path / "out", any_base=True)

    def test_other_shapes(self, pair, tmp_path, stir):
        _, first, _ = pair()
        wide = tiny.network("llama", hidden_size=64)
        stir(wide, AdapterConfig(rank=2, targets=["q_proj"]))
        save_adapter(tmp_path / "wide", collect(wide))
        with pytest.raises(AdapterError, match=r"q_proj: has shape \[64, 64\]") as caught:
            merge([str(first), str(tmp_path / "wide")], tmp_path / "out")
        assert len(caught.value.problems) == 2

    def test_what_cancels_loses_nothing(self, pair, tmp_path):
        _, first, _ = pair()
        done = merge([str(first), f"{first}=-1"], tmp_path / "out", rank=1)
        assert done.error == 0 and "exact" in str(done)
        assert not any(mx.any(m.arrays["lora_b"]).item() for m in read_adapter(tmp_path / "out").modules.values())

    def test_options(self, pair, tmp_path):
        _, first, second = pair()
        for wrong in (
            {"method": "mean"},
            {"rank": 0},
            {"density": 0.5},
            {"method": "ties", "density": 0.0},
            {"method": "dare", "density": 1.5},
        ):
            with pytest.raises(ConfigError):
                merge([str(first), str(second)], tmp_path / "out", **wrong)
        with pytest.raises(ConfigError, match="nothing to merge"):
            merge([f"{first}=0"], tmp_path / "out")
        with pytest.raises(InputError, match="exists"):
            merge([str(first)], second)
        assert not (tmp_path / "out").exists()
