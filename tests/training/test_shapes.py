"""Batches by their shape, held against those of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlxlora.data import BatchConfig, SamplesConfig, load
from mlxlora.engine.packing import end_to_end
from mlxlora.tokenizer import Tokenizer
from mlxlora.training.shapes import Shape, ladder, largest, synthetic
from tests import tiny


def test_a_batch_with_padding_is_as_full_as_the_one_it_stands_for() -> None:
    shape = Shape(4, 100, 0.5, filled=0.4)
    batch = synthetic(shape, tiny.VOCABULARY)
    assert batch.tokens.shape == (4, 100)
    assert batch.weights.sum().item() == shape.targets == 80
    places = np.array(batch.loss_positions)[np.array(batch.weights) > 0]
    assert {*(places // 100)} == {0, 1, 2, 3}
    laid = end_to_end(batch, traced=False)
    assert laid.tokens.shape[0] == 1 and laid.tokens.shape[1] == pytest.approx(160, abs=8)
    one = synthetic(shape.row(64), tiny.VOCABULARY)
    assert end_to_end(one, traced=False).tokens.shape == (1, 64)


def test_shapes_grow_to_the_one_that_is_meant() -> None:
    shape = Shape(8, 4096, 0.5)
    sizes = [one.tokens for one in ladder(shape)]
    assert sizes[-1] == 8 * 4096 and sizes[0] <= 512 and sizes == sorted(sizes)
    assert ladder(Shape(2, 100, 1.0)) == [Shape(2, 100, 1.0)]


def test_the_largest_batch_of_the_data(tmp_path: Path) -> None:
    tiny.model_directory(tmp_path / "model", "llama")
    tokenizer = Tokenizer.load(tmp_path / "model")
    rows = [{"text": "word " * count} for count in (5, 80, 40, 10, 7, 60)]
    splits = load(rows, tokenizer, SamplesConfig(validation_split=0.0))
    shape = largest(splits.train, BatchConfig(batch_size=2), unpadded=False)
    assert shape.rows <= 2 and shape.tokens >= splits.train.lengths.max() and 0.8 < shape.learned <= 1.0
    packed = largest(splits.train, BatchConfig(batch_size=2, packing=True, max_length=200), unpadded=True)
    assert packed.documents > 1
    assert synthetic(packed, tiny.VOCABULARY).segments is not None
