"""What a person is told of a model that the engine's ways do not reach: which part, and no more than is true."""

from __future__ import annotations

import pytest

from mlxlora import mlxlm
from mlxlora.adapters import AdapterConfig, inject
from mlxlora.engine import Engine, EngineConfig
from mlxlora.errors import UnsupportedError
from mlxlora.objectives.sft import sft
from tests import reference, tiny
from tests.architectures import small

SQUARES = "attention keeps tokens × tokens"
OTHERWISE = "tokens see each other by more than attention"


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("llama", []),
        ("gemma2", []),  # its attention is its own, and so is ours for it
        ("gpt_oss", []),
        ("gpt2", []),
        ("deepseek_v3", [SQUARES]),  # MLA
        ("mamba", [OTHERWISE]),  # no attention at all: nothing is squared
        ("mamba2", [OTHERWISE]),
        ("qwen3_next", [OTHERWISE]),  # linear attention in some of its blocks
        ("falcon_h1", [OTHERWISE]),  # a state beside attention in each
        ("lfm2", [OTHERWISE]),
    ],
)
def test_another_kind_of_attention_trains_and_says_so(family: str, said: list[str]) -> None:
    network = tiny.network(family)
    inject(network, AdapterConfig(rank=2), seed=0)
    reference.awaken(network)
    engine = Engine(network)
    about = [note for note in engine.notes if "attention" in note]
    assert len(about) == len(said) and all(note.startswith(start) for note, start in zip(about, said, strict=True))
    assert engine.keeps_squares is (SQUARES in said)
    batch = reference.padded(reference.samples([20, 13], tiny.VOCABULARY))
    value, _, grads = reference.step(network, batch)
    total, _, _, found = engine.value_and_grad(sft, batch)
    assert total.item() == pytest.approx(value.item(), rel=1e-5)
    assert reference.gradient_error(found, grads) < 1e-4
    engine.close()


def test_linear_memory_is_refused_where_there_is_none() -> None:
    network = tiny.network("mamba")
    inject(network, AdapterConfig(rank=2), seed=0)
    with pytest.raises(UnsupportedError, match="no attention of the usual kind"):
        Engine(network, EngineConfig(attention="linear"))


def test_blocks_that_cannot_run_twice_are_told_of_before_the_first_step() -> None:
    """They hand keys on to others by way of a cache. A lazy look would come when the notes have been shown."""
    network = mlxlm.build(small.config("afm7"))
    inject(network, AdapterConfig(rank=2), seed=0)
    engine = Engine(network)
    one_graph, kept = engine.notes
    assert one_graph.endswith("cannot be called one by one (a layer of a block returns more than one array)")
    assert kept.startswith("everything is kept")
    assert engine.grades == ("none",)
