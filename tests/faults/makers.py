"""Every verb that makes a model, an adapter or a data set, as one call: what test_kill_verbs.py kills.

prepare(place, ["merge", "export --to gguf"])   what these read
make("merge", place, folder)                    one call, which writes target("merge", folder)
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests import tiny
from tests.faults import session

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Maker:
    """call: writes its second argument from what lies in its first; reads: names in INPUTS; needs: a package"""

    call: Callable[[Path, Path], None]
    reads: tuple[str, ...] = ("model", "one")
    needs: str | None = None


# ---- what the verbs read ----------------------------------------------------------------------------------------


def exported(kind: str, **more: Any) -> Callable[[Path, Path], None]:
    def call(place: Path, out: Path) -> None:
        from mlxlora_convert.export import export

        export(str(place / "model"), kind, out, adapter=[str(place / "one")], **{"check": False, **more})

    return call


def torch_weights(place: Path) -> None:
    """The model as a Hugging Face directory of former years."""
    import torch

    out = Path(shutil.copytree(place / "model", place / "torch"))
    arrays = tiny.tensors(out / "model.safetensors")
    torch.save({name: torch.tensor(value.tolist()) for name, value in arrays.items()}, out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()


# in the order in which they are made: a later one may read an earlier one
INPUTS: dict[str, Callable[[Path], object]] = {
    "model": lambda place: tiny.model_directory(place / "model", "llama", **SIZES),
    "small": lambda place: tiny.model_directory(place / "small", "llama", {"bits": 4, "group_size": 64}, **SIZES),
    "one": lambda place: tiny.adapter_directory(place / "one", place / "model"),
    "two": lambda place: tiny.adapter_directory(place / "two", place / "model", seed=2),
    "on-small": lambda place: tiny.adapter_directory(place / "on-small", place / "small"),
    "peft": lambda place: exported("peft")(place, place / "peft"),
    "mlx-lm": lambda place: exported("mlx-lm")(place, place / "mlx-lm"),
    "model.gguf": lambda place: exported("gguf")(place, place / "model.gguf"),
    "torch": torch_weights,
    "rows": lambda place: rows(place / "rows"),
}


# ---- the verbs --------------------------------------------------------------------------------------------------


def fuse(place: Path, out: Path) -> None:
    from mlxlora.fuse import fuse as call

    call(str(place / "model"), [str(place / "one"), f"{place / 'two'}=0.5"], out)


def fuse_quantized(place: Path, out: Path) -> None:
    from mlxlora.fuse import fuse as call

    call(str(place / "small"), [str(place / "on-small")], out, max_kl=100.0)


def merge(place: Path, out: Path) -> None:
    from mlxlora.merge import merge as call

    call([str(place / "one"), f"{place / 'two'}=0.5"], out)


def convert(place: Path, out: Path, source: str = "model") -> None:
    from mlxlora.convert import convert as call
    from mlxlora.quantize import QuantizeConfig

    call(str(place / source), out, quantize=QuantizeConfig(bits=4))


def rows(place: Path) -> None:
    """A data set of two splits."""
    place.mkdir()
    for split in ("train", "valid"):
        session.rows(place / f"{split}.jsonl", count=1500)


def data_convert(place: Path, out: Path, source: str = "rows") -> None:
    from mlxlora.data.convert import convert as call

    call([str(place / source)], out=out, to="sharegpt")


def imported(name: str) -> Maker:
    def call(place: Path, out: Path) -> None:
        from mlxlora_convert.export import import_

        import_(place / name, out, model=None if name.endswith("gguf") else str(place / "model"))

    return Maker(call, ("model", "one", name))


MAKERS = {
    "fuse": Maker(fuse, ("model", "one", "two")),
    "fuse onto 4 bits": Maker(fuse_quantized, ("small", "on-small")),
    "merge": Maker(merge, ("model", "one", "two")),
    "convert": Maker(convert),
    "convert .bin": Maker(partial(convert, source="torch"), ("model", "torch"), "torch"),
    "data convert": Maker(data_convert, ("rows",)),
    "data convert --out out.jsonl": Maker(partial(data_convert, source="rows/train.jsonl"), ("rows",)),
    "export --to peft": Maker(exported("peft")),
    "export --to mlx-lm": Maker(exported("mlx-lm")),
    "export --to mlx": Maker(exported("mlx")),
    "export --to hf": Maker(exported("hf")),
    "export --to gguf": Maker(exported("gguf")),
    "export --to gguf-lora": Maker(exported("gguf-lora")),
    "export --to ollama": Maker(exported("ollama")),
    "export --to lmstudio": Maker(exported("lmstudio")),
    "export --to peft --check": Maker(exported("peft", check=True), needs="peft"),
    "export --to gguf --check": Maker(exported("gguf", check=True), needs="xllamacpp"),
    "export --to gguf-lora --check": Maker(exported("gguf-lora", check=True), needs="xllamacpp"),
    "import PEFT": imported("peft"),
    "import mlx-lm": imported("mlx-lm"),
    "import GGUF": imported("model.gguf"),
}


def possible() -> list[str]:
    """Those for which everything is installed."""
    return [name for name, one in MAKERS.items() if one.needs is None or importlib.util.find_spec(one.needs)]


def prepare(place: Path, names: list[str]) -> Path:
    """Make what these read, and no more."""
    place.mkdir()
    wanted = {name for maker in names for name in MAKERS[maker].reads}
    for name, write in INPUTS.items():
        if name in wanted:
            write(place)
    return place


def target(name: str, folder: Path) -> Path:
    """Where a maker writes below `folder`."""
    if name.startswith("export --to gguf"):
        return folder / "out.gguf"
    return folder / ("out.jsonl" if name.endswith(".jsonl") else "out")


def make(name: str, place: Path, folder: Path) -> None:
    """One call, in a process of its own; what it says goes nowhere."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    MAKERS[name].call(place, target(name, folder))
