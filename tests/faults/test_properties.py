"""Properties that hold for every input (hypothesis): what is saved comes back bit for bit, what is put into batches is
learned once and in its place, and no token sees what it may not.

Plans of batches have theirs in tests/data/test_batches.py, maps of names in tests/convert/test_names.py.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxlora.data import BatchConfig, collate, plan_epoch
from mlxlora.data.sample import Sample
from mlxlora.engine.attention import attend
from mlxlora.engine.masks import layout_of
from mlxlora.engine.pattern import Pattern
from mlxlora.files import check_safetensors, load_safetensors, save_safetensors
from mlxlora.training.checkpoint import TrainingState, read_checkpoint, write_checkpoint

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

DTYPES = {
    "float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16, "uint8": mx.uint8, "int8": mx.int8,
    "uint16": mx.uint16, "int16": mx.int16, "uint32": mx.uint32, "int32": mx.int32, "uint64": mx.uint64,
    "int64": mx.int64, "bool": mx.bool_, "complex64": mx.complex64,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
BY_SIZE = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")


@st.composite
def arrays(draw: st.DrawFn) -> mx.array:
    """Any bits in any dtype: NaN payloads, infinities, denormals and negative zeros included."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = int(np.prod(shape, dtype=int))
    raw = draw(st.binary(min_size=count * dtype.size, max_size=count * dtype.size))
    if dtype == mx.bool_:
        return mx.array(np.frombuffer(raw, np.uint8).reshape(shape) % 2 == 1)
    bits = mx.array(np.frombuffer(raw, UNSIGNED[dtype.size]).reshape(shape))
    array = bits.view(dtype)
    return array.T if draw(st.booleans()) else array


def bits(array: mx.array) -> tuple[Any, ...]:
    plain = array if array.dtype == mx.bool_ else mx.contiguous(array).view(BY_SIZE[array.dtype.size])
    return array.dtype, array.shape, np.asarray(plain).tobytes()


tensors = st.dictionaries(names, arrays(), max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@quick
@given(tensors, st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=2))
def test_safetensors_come_back_bit_for_bit(given_tensors: dict[str, mx.array], metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        save_safetensors(path, given_tensors, metadata)
        assert {name: shape for name, (_, shape) in check_safetensors(path).items()} == {
            name: tuple(array.shape) for name, array in given_tensors.items()
        }
        loaded = load_safetensors(path)
        assert {name: bits(array) for name, array in loaded.items()} == {
            name: bits(array) for name, array in given_tensors.items()
        }


@quick
@given(
    tensors,
    tensors,
    st.tuples(*[st.integers(0, 2**53 - 1)] * 3),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), json_values, max_size=4),
)
def test_a_checkpoint_comes_back_bit_for_bit(
    adapter: dict[str, mx.array],
    optimizer: dict[str, mx.array],
    progress: tuple[int, int, int],
    counters: dict[str, Any],
) -> None:
    state = TrainingState(*progress, adapter=adapter, optimizer=optimizer, counters=json.loads(json.dumps(counters)))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), state, "owner")
        found = read_checkpoint(Path(folder), "owner")
    assert (found.step, found.epoch, found.position, found.counters) == (*progress, state.counters)
    for kind in ("adapter", "optimizer"):
        before, after = getattr(state, kind), getattr(found, kind)
        assert {name: bits(array) for name, array in after.items()} == {name: bits(a) for name, a in before.items()}


samples = st.lists(
    st.lists(st.tuples(st.integers(1, 500), st.sampled_from([0.0, 0.5, 1.0, 2.0])), min_size=2, max_size=30).map(
        lambda pairs: Sample(np.array([t for t, _ in pairs], np.int32), np.array([w for _, w in pairs], np.float32))
    ),
    min_size=1,
    max_size=12,
)


@quick
@given(samples, st.booleans(), st.integers(1, 4), st.integers(0, 5))
def test_a_batch_learns_each_weighted_token_once_from_what_stands_before_it(
    made: list[Sample], packing: bool, rows: int, epoch: int
) -> None:
    lengths = np.array([len(sample.tokens) for sample in made], np.int32)
    config = BatchConfig(batch_size=rows, packing=packing, max_length=64)
    learned: dict[int, list[tuple[int, int, float]]] = {}
    for planned in plan_epoch(lengths, config, seed=1, epoch=epoch):
        batch = collate(made, planned, pad_id=0)
        tokens = np.array(batch.tokens)
        found = zip(np.array(batch.loss_positions), np.array(batch.targets), np.array(batch.weights), strict=True)
        pairs = sorted((int(at), int(target), float(weight)) for at, target, weight in found if weight)
        wanted = []
        for row, numbers in enumerate(planned.rows):
            begin = row * tokens.shape[1]
            for number in numbers:
                sample = made[number]
                assert number not in learned and len(sample.tokens) <= tokens.shape[1]
                assert tokens.reshape(-1)[begin : begin + len(sample.tokens)].tolist() == sample.tokens.tolist()
                own = [
                    (begin + place - 1, int(sample.tokens[place]), float(sample.weights[place]))
                    for place in range(1, len(sample.tokens))
                    if sample.weights[place]
                ]
                learned[number] = own
                wanted += own
                begin += len(sample.tokens)
        assert pairs == sorted(wanted)
    assert sorted(learned) == list(range(len(made)))


@quick
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3),
    st.none() | st.integers(1, 40),
    st.sampled_from([0, 1, 5, 16]),
    st.booleans(),
)
def test_a_token_sees_its_own_document_within_its_window_and_nothing_else(
    documents: list[list[int]], window: int | None, chunk: int, traced: bool
) -> None:
    """With equal scores, attention over one-hot values tells who is seen: each with the same share."""
    length = max(map(sum, documents)) + 1  # a place of padding at least
    rows = [np.repeat(np.arange(len(row)), row) for row in documents]
    segments = np.stack([np.pad(row, (0, length - len(row)), constant_values=-1) for row in rows]).astype(np.int32)
    layout = layout_of(mx.array(segments), linear=True, chunk=chunk, traced=traced)
    zeros = mx.zeros((len(rows), 1, length, 4))
    seen, _ = attend(
        zeros,
        zeros,
        mx.broadcast_to(mx.eye(length), (len(rows), 1, length, length)),
        scale=1.0,
        pattern=Pattern(window, layout.lookback, layout.firsts, None, layout.chunk),
        segments=mx.array(segments),
    )
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    allowed = (key <= query) & (query - key < (window or length)) & (segments[:, :, None] == segments[:, None, :])
    np.testing.assert_allclose(np.array(seen)[:, 0], allowed / allowed.sum(-1, keepdims=True), atol=1e-6)
