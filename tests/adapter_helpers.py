"""What the tests of adapters share."""

import mlx.core as mx

from mlxlora.adapters import inject
from mlxlora.adapters.inject import get_module


def stir(network, config, seed=5, size=0.05):
    """Inject, and move every learned array away from its start."""
    injection = inject(network, config, seed=seed)
    for number, path in enumerate(injection.paths):
        module = get_module(network, path)
        names = getattr(module, "learned", None) or [k for k, v in module.items() if isinstance(v, mx.array)]
        for name, key in zip(names, mx.random.split(mx.random.key(seed * 1000 + number), len(names)), strict=True):
            old = dict.__getitem__(module, name)
            module[name] = old + size * mx.random.normal(old.shape, key=key)
    mx.eval(network.parameters())
    return injection
