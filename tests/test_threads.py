"""What one thread made works in another: MLX evaluates an array only in the thread whose stream it is to run on."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mlxlora import AdapterConfig, Engine, LanguageModel, TrainingConfig, finetune, load
from mlxlora.adapters import inject
from mlxlora.generate import SamplingConfig, complete
from mlxlora.objectives.sft import sft
from mlxlora.parameters import number
from tests import reference, tiny

T = TypeVar("T")


def in_a_thread(function: Callable[..., T], *args: Any, **options: Any) -> T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args, **options).result()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_directory(tmp_path_factory.mktemp("base") / "model", "qwen3")


def test_training_in_a_thread_and_what_it_made_in_another(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{word}?", "completion": "yes"} for word in ("one", "two", "three", "four")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = TrainingConfig(steps=2, sample_every=0)
    adapter = AdapterConfig(rank=2)
    in_a_thread(finetune, str(base), [str(tmp_path / "data.jsonl")], tmp_path / "run", adapter=adapter, training=few)
    model = in_a_thread(load, base, adapter=[str(tmp_path / "run")])

    def said(model: LanguageModel) -> str:
        return complete(model, "one?", SamplingConfig(max_tokens=5)).text

    assert in_a_thread(said, model) == said(model)
    assert in_a_thread(said, load(base, adapter=[str(tmp_path / "run")])) == said(model)


def test_an_engine_goes_from_thread_to_thread(base: Path) -> None:
    network = load(base).network
    inject(network, AdapterConfig(rank=2))
    batch = reference.padded(reference.samples([20, 20], tiny.VOCABULARY))

    def loss(engine: Engine) -> float:
        return number(engine.value_and_grad(sft, batch)[0])

    expected = loss(Engine(network))
    assert in_a_thread(loss, Engine(network)) == expected
    assert loss(in_a_thread(Engine, network)) == expected
