"""What makes a run this run: what must not change while it is unfinished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlxlora.adapters.checks import WEIGHTS
from mlxlora.adapters.files import find
from mlxlora.data import DataSplits
from mlxlora.errors import ConfigError, nearest
from mlxlora.files import plain, sha256
from mlxlora.model import fingerprint
from mlxlora.tokenizer import Tokenizer

# settings that may differ when an unfinished run goes on: they say how long, how often and in what memory
FREE = {
    f"training.{name}"
    for name in (
        "epochs", "steps", "validate_every", "save_every", "sample_every", "report_every", "keep", "patience",
        "target_loss", "max_minutes", "skip_nonfinite", "checkpoint_blocks", "loss_chunk",
    )
} | {"samples.cache"}  # fmt: skip


def identify(path: Path, tokenizer: Tokenizer, splits: DataSplits, call: dict[str, Any]) -> dict[str, Any]:
    """What must not change while a run is unfinished: contents by their hashes, settings by their values."""
    settings = {
        f"{group}.{field.name}": plain(getattr(call[group], field.name))
        for group in ("samples", "adapter", "optimizer", "training")
        for field in fields(call[group])
    }
    start = call.get("start_from")
    return {
        "model": fingerprint(path),
        "start_from": None if start is None else sha256(find(start) / WEIGHTS),
        "tokenizer": tokenizer.fingerprint,
        "chat template": hashed(tokenizer.chat_templates),
        "data": splits.train.fingerprint,
        "validation data": splits.valid.fingerprint if splits.valid is not None else None,
    } | {name: value for name, value in settings.items() if name not in FREE}


def hashed(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def check_accepted(names: Sequence[str], identity: dict[str, Any]) -> list[str]:
    """The settings that the caller lets differ: the optimizer's, but not which optimizer it is."""
    allowed = [name for name in identity if name.startswith("optimizer.") and name != "optimizer.name"]
    for name in names:
        if name not in allowed:
            raise ConfigError(
                f"accept_changes: '{name}' is none of the settings that may change within a run."
                f"{nearest(name, allowed)} They are: {', '.join(allowed)}."
            )
    return list(names)
