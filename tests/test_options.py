"""Every option of a run is used by a test (a guard), and the three that no other test moves change what they should."""

import re
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import pytest

from mlxlora.adapters import AdapterConfig
from mlxlora.data import SamplesConfig, load
from mlxlora.data.config import BatchConfig
from mlxlora.generate import SamplingConfig
from mlxlora.tokenizer import Tokenizer
from mlxlora.training.config import TrainingConfig
from mlxlora.training.optimizer import Optimizer, OptimizerConfig
from tests import tiny

CONFIGURATIONS = [TrainingConfig, OptimizerConfig, AdapterConfig, SamplesConfig, BatchConfig, SamplingConfig]


def test_every_option_is_set_by_a_test() -> None:
    """That the option is set says little; that none is forgotten when it is added says enough."""
    sources = [path for path in Path(__file__).parent.rglob("*.py") if path.name != "test_wrong_configurations.py"]
    text = "\n".join(path.read_text() for path in sources)
    missing = [
        f"{kind.__name__}.{field.name}"
        for kind in CONFIGURATIONS
        for field in fields(kind)
        if not re.search(rf'(?<!\w){field.name}(?=\s*[=":])', text)
    ]
    assert not missing, f"no test sets {', '.join(missing)}"


def stepped(config: OptimizerConfig, updates: int = 2) -> dict[str, mx.array]:
    parameters = {"matrix": mx.ones((2, 2)), "vector": mx.ones((2,))}
    gradients = {name: mx.full(value.shape, 0.1) for name, value in parameters.items()}
    optimizer = Optimizer(config, 10)
    optimizer.init(parameters)
    for step in range(updates):
        parameters, _, _ = optimizer.update(parameters, gradients, mx.array(1.0), mx.array(1.0), step)
    return parameters


def test_momentum() -> None:
    common = {"name": "sgd", "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0}
    plain = stepped(OptimizerConfig(**common, momentum=0.0))["vector"]
    heavy = stepped(OptimizerConfig(**common, momentum=0.5))["vector"]
    assert plain.tolist() == pytest.approx([0.98] * 2)
    assert heavy.tolist() == pytest.approx([1 - 0.01 - 0.015] * 2)


def test_what_is_decayed() -> None:
    common = {"name": "adamw", "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.5}
    matrices = stepped(OptimizerConfig(**common, decay_min_dims=2), 1)
    everything = stepped(OptimizerConfig(**common, decay_min_dims=0), 1)
    nothing = stepped(OptimizerConfig(**common, decay_min_dims=3), 1)
    assert matrices["matrix"].tolist() == everything["matrix"].tolist() != nothing["matrix"].tolist()
    assert matrices["vector"].tolist() == nothing["vector"].tolist() != everything["vector"].tolist()


def test_validation_rows(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny.model_directory(tmp_path / "model", "qwen3"))
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(40)]
    for most, expected in ((3, 3), (1000, 20)):
        splits = load(rows, tokenizer, SamplesConfig(validation_split=0.5, validation_rows=most), seed=0)
        assert splits.valid is not None and len(splits.valid) == expected and len(splits.train) == 40 - expected
