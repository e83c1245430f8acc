"""Properties that hold for every input (hypothesis): what is saved comes back bit for bit, whatever it is."""

import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
names = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(lambda name: name != "__metadata__")


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
    st.tuples(*[st.integers(0, 2**53)] * 3),
    st.dictionaries(st.text(st.characters(exclude_categories=("Cs",)), max_size=8), json_values, max_size=4),
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
