"""The readers that damaged files are fed to, each with sound files to start from and a judge of what it accepts."""

from __future__ import annotations

import functools
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora.errors import MlxLoraError
from tests.faults import foreign, gguf_files
from tests.faults.sound import scratch


@dataclass(frozen=True)
class Target:
    """A reader under attack.

    seeds:  sound files, each of which the reader takes
    read:   given what `place` made, returns or raises one of `refusals`
    judge:  raises when what was read cannot have been meant; (place, value)
    place:  puts the damaged bytes of seed number `index` where the reader finds them: (folder, index, bytes)
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], Any]
    judge: Callable[[Path, Any], None] = lambda path, value: None
    suffix: str = ""
    place: Callable[[Path, int, bytes], Path] | None = None
    refusals: tuple[type[Exception], ...] = (MlxLoraError,)

    def put(self, folder: Path, index: int, data: bytes) -> Path:
        """Write the bytes; returns what to read."""
        if self.place is not None:
            return self.place(folder, index, data)
        path = folder / f"hostile{self.suffix}"
        path.write_bytes(data)
        return path


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


# ---- directories --------------------------------------------------------------------------------------------------


def damaged_copy(sound: Path, folder: Path, name: str, data: bytes) -> Path:
    """The directory `sound`, with other bytes for one of its files."""
    target = folder / "damaged"
    target.mkdir(exist_ok=True)
    for path in sound.iterdir():
        place = target / path.name
        place.unlink(missing_ok=True)
        if path.name == name:
            place.write_bytes(data)
        else:
            place.hardlink_to(path)
    return target


ADAPTER_FILES = ("manifest.json", "adapter_config.json", "adapters.safetensors")


@functools.cache
def sound_adapter() -> Path:
    from mlxlora.adapters import Adapter, Module, save_adapter

    modules = {
        f"model.layers.{layer}.self_attn.q_proj": Module(
            {"lora_a": mx.ones((8, 2 + layer)), "lora_b": mx.full((2 + layer, 8), 0.5)}, 2.0 + layer
        )
        for layer in (0, 1)
    }
    return save_adapter(scratch() / "adapter", Adapter("lora", modules, layers=2, base="0" * 64, base_name="tiny"))


def adapter_seeds() -> list[bytes]:
    return [(sound_adapter() / name).read_bytes() for name in (*ADAPTER_FILES, *ADAPTER_FILES[1:])]


def place_adapter(folder: Path, index: int, data: bytes) -> Path:
    """Seeds 0 to 2: with a manifest; 3 and 4: as mlx-lm writes adapters, without one."""
    name = ADAPTER_FILES[index] if index < 3 else ADAPTER_FILES[index - 2]
    target = damaged_copy(sound_adapter(), folder, name, data)
    if index >= 3:
        (target / "manifest.json").unlink()
    return target


def read_adapter(path: Path) -> Any:
    from mlxlora.adapters import read_adapter

    return read_adapter(path)


def judge_adapter(path: Path, adapter: Any) -> None:
    """Nothing but factors, whole and finite, with a sane scale; with a manifest exactly what was written."""
    assert adapter.type == "lora" and not adapter.weights
    for name, module in adapter.modules.items():
        assert set(module.arrays) == {"lora_a", "lora_b"}, name
        assert abs(module.scale) <= 1e4 and all(mx.isfinite(a).all().item() for a in module.arrays.values()), name
    if (path / "manifest.json").exists():
        files = ADAPTER_FILES[1:]
        assert all((path / name).read_bytes() == (sound_adapter() / name).read_bytes() for name in files)


CHECKPOINT_FILES = ("manifest.json", "state.json", "adapter.safetensors", "optimizer.safetensors")


@functools.cache
def sound_checkpoint() -> Path:
    from mlxlora.training.checkpoint import TrainingState, write_checkpoint

    path = scratch() / "checkpoint"
    path.mkdir()
    state = TrainingState(7, 1, 2, {"a": mx.ones((3, 2))}, {"m": mx.zeros(4), "step": mx.array(7)}, {"best_loss": 0.5})
    write_checkpoint(path, state, "owner")
    return path


def checkpoint_seeds() -> list[bytes]:
    return [(sound_checkpoint() / name).read_bytes() for name in CHECKPOINT_FILES]


def place_checkpoint(folder: Path, index: int, data: bytes) -> Path:
    return damaged_copy(sound_checkpoint(), folder, CHECKPOINT_FILES[index], data)


def read_checkpoint(path: Path) -> Any:
    from mlxlora.training.checkpoint import read_checkpoint

    return read_checkpoint(path, "owner")


def judge_checkpoint(path: Path, state: Any) -> None:
    """Only a change to the manifest that says the same (white space) can pass."""
    for name in CHECKPOINT_FILES[1:]:
        assert (path / name).read_bytes() == (sound_checkpoint() / name).read_bytes(), name
    assert (state.step, state.epoch, state.position, state.counters) == (7, 1, 2, {"best_loss": 0.5})


MODEL_FILES = ("config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json")


@functools.cache
def sound_model() -> Path:
    from tests import tiny

    return Path(tiny.model_directory(scratch() / "model", "qwen3"))


def model_seeds() -> list[bytes]:
    return [(sound_model() / name).read_bytes() for name in MODEL_FILES]


def place_model(folder: Path, index: int, data: bytes) -> Path:
    return damaged_copy(sound_model(), folder, MODEL_FILES[index], data)


def read_model(path: Path) -> Any:
    from mlxlora import model

    loaded = model.load(path, lazy=True)
    loaded.tokenizer.encode("Hello, world")
    return loaded


# ---- data and templates -------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4 \u00e9"}]}
ROWS = {
    "train.jsonl": (json.dumps(CHAT) + "\n") * 3 + json.dumps(CHAT, ensure_ascii=False) + "\n",
    "train.json": json.dumps([CHAT, CHAT], indent=1),
    "train.csv": 'prompt,completion\nWhat?,That\n"a, b","c\nd"\n',
    "train.txt": "Some text.\n\nMore of it.\n",
}


def rows_seeds() -> list[bytes]:
    return [text.encode() for text in ROWS.values()]


def place_rows(folder: Path, index: int, data: bytes) -> Path:
    path = folder / list(ROWS)[index]
    path.write_bytes(data)
    return path


@functools.cache
def tokenizer() -> Any:
    from mlxlora.tokenizer import Tokenizer

    return Tokenizer.load(sound_model())


def read_rows(path: Path) -> Any:
    from mlxlora import data

    return data.load(path, tokenizer(), data.SamplesConfig(max_length=128), seed=0)


def judge_rows(path: Path, splits: Any) -> None:
    for split in (splits.train, splits.valid, splits.test):
        for sample in split or ():
            assert len(sample.tokens) == len(sample.weights) and sample.weights[0] == 0 and sample.weights.sum() > 0
            assert sample.tokens.min() >= 0 and sample.tokens.max() < tokenizer().vocab_size


def template_seeds() -> list[bytes]:
    from tests import tiny

    loop = "{%- for m in messages -%}{%- if m.role == 'user' -%}[{{ m.content | trim }}]{%- else -%}{{ m['content'] }}"
    loop += "{{ eos_token }}{%- endif -%}{%- endfor -%}{%- set ns = namespace(n=0) -%}{%- macro f(x) -%}{{ x * 2 }}"
    return [tiny.CHATML.encode(), (loop + "{%- endmacro -%}{{ f('ab') }}{{ messages | tojson(indent=2) }}").encode()]


def read_template(path: Path) -> Any:
    from mlxlora.data.template import ChatTemplate
    from mlxlora.files import read_text

    template = ChatTemplate(read_text(path), {"eos_token": "</s>"})
    return template.render(CHAT["messages"], add_generation_prompt=True)


def template_refusals() -> tuple[type[Exception], ...]:
    from mlxlora.data.template import TemplateRefusal

    return (MlxLoraError, TemplateRefusal)


TARGETS: dict[str, Target] = {
    "safetensors": Target(safetensors_seeds, read_safetensors, judge_safetensors, ".safetensors"),
    "json": Target(json_seeds, read_json, suffix=".json"),
    "yaml": Target(yaml_seeds, read_yaml, suffix=".yaml"),
    "zip": Target(zip_seeds, read_zip, judge_zip, ".zip"),
    "adapter": Target(adapter_seeds, read_adapter, judge_adapter, place=place_adapter),
    "peft": Target(foreign.peft_seeds, foreign.read, foreign.judge, place=foreign.place_peft),
    "mlx-lm": Target(foreign.mlxlm_seeds, foreign.read, foreign.judge, place=foreign.place_mlxlm),
    "checkpoint": Target(checkpoint_seeds, read_checkpoint, judge_checkpoint, place=place_checkpoint),
    "model": Target(model_seeds, read_model, place=place_model),
    "rows": Target(rows_seeds, read_rows, judge_rows, place=place_rows),
    "template": Target(template_seeds, read_template, suffix=".jinja", refusals=template_refusals()),
    "gguf": Target(gguf_files.gguf_seeds, gguf_files.read_header, gguf_files.judge_header, ".gguf"),
    "gguf-model": Target(gguf_files.gguf_seeds, gguf_files.read_model, gguf_files.judge_model, ".gguf"),
}
