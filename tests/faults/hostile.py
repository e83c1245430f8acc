"""Feed damaged files to every reader: none may crash, hang, take memory without bound, or believe a lie.

    python -m tests.faults.hostile safetensors 0 1000     one reader, damage number 0 to 999

A reader may return or raise what mlxlora raises on purpose; anything else is a defect. What a reader accepts is
handed on to a judge that we did not write where there is one.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.mutate import mutate

LIMIT = 10.0  # seconds that one file may take
MEMORY = 6 << 30  # bytes of address space beyond what is in use when the readers begin


@dataclass(frozen=True)
class Target:
    """seeds: sound files; read: a file on disk, returns or raises MlxLoraError; judge: what it accepted."""

    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], Any]
    judge: Callable[[Path, Any], None] = lambda path, value: None
    suffix: str = ""


# ---- safetensors ------------------------------------------------------------------------------------------------


def safetensors_seeds() -> list[bytes]:
    import mlx.core as mx

    from mlxlora.files import save_safetensors

    tensors = {
        "model.layers.0.lora_a": mx.arange(12, dtype=mx.float32).reshape(4, 3),
        "b": mx.array([1.5, 2.5], dtype=mx.bfloat16),
        "scalar": mx.array(3, dtype=mx.uint64),
        "empty": mx.zeros((0, 2)),
        "bytes": mx.array([1, 2, 3], dtype=mx.uint8),
    }
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "a"), Path(folder, "b.safetensors")
        save_safetensors(ours, tensors, {"format": "mlx"})
        mx.save_safetensors(str(theirs), tensors)
        return [ours.read_bytes(), theirs.read_bytes()]


def read_safetensors(path: Path) -> Any:
    import mlx.core as mx

    from mlxlora.files import load_safetensors

    tensors = load_safetensors(path)
    mx.eval(list(tensors.values()))
    return tensors


def judge_safetensors(path: Path, tensors: Any) -> None:
    """The reference implementation must accept it, too, and see the same shapes."""
    from safetensors import safe_open

    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if b"C64" in data[8 : 8 + size]:
        return  # which not every version of the reference knows
    with safe_open(str(path), framework="np") as reference:
        theirs = {name: tuple(reference.get_slice(name).get_shape()) for name in reference.keys()}  # noqa: SIM118
    ours = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert ours == theirs, f"ours {ours}, the reference {theirs}"


# ---- text -------------------------------------------------------------------------------------------------------


def json_seeds() -> list[bytes]:
    value = {"rank": 8, "scale": 2.0, "targets": ["q_proj", "v_proj"], "nested": {"a": [1, 2.5e-3, None, True, "ä\n"]}}
    return [json.dumps(value, indent=1).encode(), b"\xef\xbb\xbf" + json.dumps(value, ensure_ascii=False).encode()]


def read_json(path: Path) -> Any:
    from mlxlora.files import read_json

    return read_json(path, unique=True)


def yaml_seeds() -> list[bytes]:
    return [
        b"model: m\nadapter: {rank: 8, alpha: 16.0, targets: [all-linear]}\noptimizer:\n  learning_rate: 1e-4\n"
        b"base: &base {a: 1, b: [x, y]}\nderived:\n  <<: *base\n  c: *base\ntext: |\n  lines\n  more\n"
    ]


def read_yaml(path: Path) -> Any:
    from mlxlora.files import read_yaml

    return read_yaml(path)


# ---- archives ---------------------------------------------------------------------------------------------------


def zip_seeds() -> list[bytes]:
    seeds = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        memory = io.BytesIO()
        with zipfile.ZipFile(memory, "w", method) as archive:
            archive.writestr("train.jsonl", '{"text": "a"}\n' * 50)
            archive.writestr("deep/valid.jsonl", '{"text": "b"}\n' * 5)
        seeds.append(memory.getvalue())
    return seeds


def read_zip(path: Path) -> Any:
    from mlxlora.files import zip_members

    return {name: len(file.read()) for name, file in zip_members(path)}


def judge_zip(path: Path, members: Any) -> None:
    for name in members:
        assert not name.startswith("/") and ".." not in Path(name).parts, name


TARGETS: dict[str, Target] = {
    "safetensors": Target(safetensors_seeds, read_safetensors, judge_safetensors, ".safetensors"),
    "json": Target(json_seeds, read_json, suffix=".json"),
    "yaml": Target(yaml_seeds, read_yaml, suffix=".yaml"),
    "zip": Target(zip_seeds, read_zip, judge_zip, ".zip"),
}


def attack(name: str, first: int, last: int) -> dict[str, int]:
    """Damage files number `first` to `last - 1` for one reader. Prints the number of each before it is read."""
    from mlxlora.errors import MlxLoraError

    target = TARGETS[name]
    seeds = target.seeds()
    counts = {"refused": 0, "accepted": 0, "defects": 0}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"hostile{target.suffix}")
        for seed in seeds:  # the sound ones pass
            path.write_bytes(seed)
            target.judge(path, target.read(path))
        for number in range(first, last):
            print(number, file=sys.stderr, flush=True)
            path.unlink()
            path.write_bytes(mutate(seeds[number % len(seeds)], number))
            start = time.monotonic()
            try:
                value = target.read(path)
            except MlxLoraError:
                counts["refused"] += 1
            except BaseException as error:
                counts["defects"] += 1
                print(f"{name} {number}: {type(error).__module__}.{type(error).__name__}: {str(error)[:300]}")
                if isinstance(error, KeyboardInterrupt):
                    raise
            else:
                counts["accepted"] += 1
                try:
                    target.judge(path, value)
                except Exception as error:
                    counts["defects"] += 1
                    print(f"{name} {number}: accepted, but {type(error).__name__}: {str(error)[:300]}")
            took = time.monotonic() - start
            slowest = max(slowest, took)
            if took > LIMIT:
                counts["defects"] += 1
                print(f"{name} {number}: took {took:.1f} s")
    print(f"{name}: {last - first} damaged files, {counts}, slowest {slowest * 1000:.0f} ms")
    return counts


def limit_memory() -> None:
    """A reader that believes a length of terabytes shall fail here, not take the machine with it."""
    import resource

    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


if __name__ == "__main__":
    limit_memory()
    sys.exit(1 if attack(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))["defects"] else 0)
