"""Tokenised once: the store, its key, and memory that stays flat."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxlora.data import Dataset, SamplesConfig, load
from mlxlora.data.store import Store
from mlxlora.errors import ConfigError, DataError, UnsupportedError
from mlxlora.tokenizer import Tokenizer

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(50)]


def entries(cache: Path) -> list[Path]:
    return [item for item in cache.iterdir() if (item / "manifest.json").is_file()]


def same(one: Dataset, two: Dataset) -> bool:
    return one.fingerprint == two.fingerprint and all(
        (a.tokens == b.tokens).all() and (a.weights == b.weights).all() and a.origin == b.origin
        for a, b in zip(one, two, strict=True)
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_the_second_run_maps_what_the_first_wrote(
    jsonl: Callable[..., Path], tokenizer: Tokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = jsonl(ROWS), SamplesConfig(cache=cache)
    first = load(path, tokenizer, config)
    assert len(entries(cache)) == 1
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("tokenised again"))
    second = load(path, tokenizer, config)
    assert same(first.train, second.train) and first.formats == second.formats and first.counts == second.counts
    assert isinstance(second.train._tokens.tokens, np.memmap)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 64}, {"loss_on": "all"}, {"thinking": "mask"}, {"template": "zephyr"}, {"prompts": "plain"},
        {"date": "2025-01-01"}, {"columns": {"prompt": "completion", "completion": "prompt"}}, {"append_eos": False},
        {"too_long": "drop"}, {"end_turns": True}, {"prepend_bos": True}, {"format": "completion"},
    ],
)  # fmt: skip
def test_what_decides_the_samples_is_in_the_key(
    jsonl: Callable[..., Path], tokenizer: Tokenizer, cache: Path, change: dict
) -> None:
    path = jsonl(ROWS)
    load(path, tokenizer, SamplesConfig(cache=cache))
    load(path, tokenizer, SamplesConfig(cache=cache, **change))
    assert len(entries(cache)) == 2


def test_what_does_not_is_not(jsonl: Callable[..., Path], tokenizer: Tokenizer, cache: Path) -> None:
    path = jsonl(ROWS)
    for change in (
        {},
        {"validation_split": 0.2},
        {"packing": True},
        {"allow_unusable": True},
        {"preference": "chosen"},
    ):
        load(path, tokenizer, SamplesConfig(cache=cache, **change))
    moved = path.rename(path.with_name("moved.jsonl"))
    again = load(moved, tokenizer, SamplesConfig(cache=cache))
    assert len(entries(cache)) == 1 and again.train.origin(0).startswith(str(moved))


def test_what_another_run_was_allowed_to_learn_is_still_refused(
    jsonl: Callable[..., Path], tokenizer: Tokenizer, cache: Path
) -> None:
    path = jsonl([{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(20)])
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="a chosen and a rejected ending"):
            load(path, tokenizer, SamplesConfig(cache=cache))
        assert len(load(path, tokenizer, SamplesConfig(cache=cache, preference="chosen")).train) == 19
    assert len(entries(cache)) == 1


def test_a_changed_file_is_read_again(jsonl: Callable[..., Path], tokenizer: Tokenizer, cache: Path) -> None:
    config = SamplesConfig(cache=cache)
    one = load(jsonl(ROWS), tokenizer, config)
    two = load(jsonl([{**row, "completion": row["completion"][::-1]} for row in ROWS]), tokenizer, config)
    assert one.train.fingerprint != two.train.fingerprint


def test_a_damaged_entry_is_made_again(jsonl: Callable[..., Path], tokenizer: Tokenizer, cache: Path) -> None:
    path, config = jsonl(ROWS), SamplesConfig(cache=cache)
    first = load(path, tokenizer, config)
    fingerprint = first.train.fingerprint
    (entry,) = entries(cache)
    (entry / "tokens.bin").write_bytes((entry / "tokens.bin").read_bytes()[:-4])
    assert load(path, tokenizer, config).train.fingerprint == fingerprint
    (entry / "manifest.json").write_text("{")
    assert load(path, tokenizer, config).train.fingerprint == fingerprint


def test_wrong_rows_leave_nothing_behind(jsonl: Callable[..., Path], tokenizer: Tokenizer, cache: Path) -> None:
    with pytest.raises(DataError):
        load(jsonl([*ROWS, {"x": 1}]), tokenizer, SamplesConfig(cache=cache))
    assert not [item for item in cache.rglob("*") if item.suffix == ".bin"]


def test_a_home_that_cannot_be_written(
    jsonl: Callable[..., Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.delenv("MLXLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load(jsonl(ROWS), tokenizer).train) > 40


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_named_cache_that_is_no_directory_is_refused(
    below: str, jsonl: Callable[..., Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no directory")
    named = tmp_path / "file" / below
    with pytest.raises(ConfigError, match=r"cache is to be a directory: .*file is a file"):
        SamplesConfig(cache=named)
    monkeypatch.setenv("MLXLORA_CACHE", str(named))
    with pytest.raises(ConfigError, match=r"\$MLXLORA_CACHE is to be a directory"):
        load(jsonl(ROWS), tokenizer)


def test_old_entries_are_removed(tmp_path: Path) -> None:
    import os

    store = Store(tmp_path)
    old = tmp_path / "old"
    old.mkdir()
    os.utime(old, (time.time() - 100 * 86_400,) * 2)
    store._prune()
    assert not old.exists()


def test_token_ids_outside_the_vocabulary(jsonl: Callable[..., Path], tokenizer: Tokenizer, cache: Path) -> None:
    path = jsonl(ROWS)
    load(path, tokenizer, SamplesConfig(cache=cache), vocabulary_size=512)
    for _ in range(2):  # the first time and from the store
        with pytest.raises(DataError, match=r"data.jsonl:1: token \d+ .* outside the model's vocabulary of 40"):
            load(path, tokenizer, SamplesConfig(cache=cache), vocabulary_size=40)


MEASURE = """
import sys, time
from pathlib import Path
from mlxlora.data import SamplesConfig, load
from mlxlora.tokenizer import Tokenizer
tokenizer = Tokenizer.load(Path(sys.argv[1]))
tokenizer.encode("warm")
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
start, highest = resident(), 0
def look(what, done, total):
    global highest
    highest = max(highest, resident())
begin = time.process_time()  # of this process alone: others may keep the machine busy
splits = load(Path(sys.argv[2]), tokenizer, SamplesConfig(cache=Path(sys.argv[3])), on_progress=look)
print(len(splits.train), (max(highest, resident()) - start) / 1e6, time.process_time() - begin)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_stays_flat_and_the_second_run_is_fast(
    jsonl: Callable[..., Path], tokenizer: Tokenizer, cache: Path
) -> None:
    """Memory above the start does not grow with the rows: a million take no more (tried by `benchmarks/data.py`)."""
    peaks = []
    for count in (2_000, 12_000):
        rows = ({"prompt": f"question {i} of many", "completion": f"the answer is {i}"} for i in range(count))
        path = jsonl(rows, f"{count}.jsonl")
        arguments = [sys.executable, "-c", MEASURE, str(tokenizer.path), str(path), str(cache)]
        for again in (False, True) if count > 10_000 else (False,):
            out = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()
            assert int(out[0]) >= count - 1000
            if again:
                assert float(out[2]) < 1
            else:
                peaks.append(float(out[1]))
    assert peaks[1] < peaks[0] + 25, peaks
