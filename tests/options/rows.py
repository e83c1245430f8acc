"""The table: for every option of every verb a value, and which views of what the verb did differ by it — no others.

A command is a verb's plain options (`PLAIN`), changed by `given`, without and with the option. `@name` stands for what
`Place` makes. Views are named by the eye that looks (`watch.EYES`).
"""

from __future__ import annotations

from typing import NamedTuple

Given = dict[str, str | None]


class Row(NamedTuple):
    """One option of one verb."""

    verb: str
    option: str
    value: str
    changes: frozenset[str]
    given: Given
    eye: str


def row(verb: str, option: str, value: str, changes: str, eye: str | None = None, **given: str | None) -> Row:
    """changes: names of views, joined by `+`; given: other options, `__` for the dot; None takes a plain one away."""
    named = {name.replace("__", "."): other for name, other in given.items()}
    return Row(verb, option, value, frozenset(changes.split("+")) - {""}, named, eye or EYE[verb])


PLAIN: dict[str, dict[str, str]] = {
    "demo": {"out": "@out", "questions": "2", "samples": "30"},
    "convert": {"model": "@model", "out": "@out", "check": "false"},
    "data check": {"data": "@rows", "model": "@model"},
    "data convert": {"data": "@rows", "out": "@out.jsonl"},
    "plan": {"model": "@model", "data": "@rows"},
    "tune": {
        "model": "@model", "data": "@rows", "out": "@out", "samples.validation_split": "0.25",
        "search.learning_rates": "0.001", "search.targets": "attention",
    },
    "train": {
        "model": "@single", "data": "@rows", "out": "@out", "samples.validation_split": "0", "adapter.rank": "2",
        "training.steps": "3", "training.checkpoint_blocks": "none", "training.batch_size": "2",
        "optimizer.learning_rate": "0.01",
    },
    "eval": {"model": "@model", "data": "@few"},
    "compare": {"model": "@model", "adapter": "@style", "data": "@few", "sampling.max_tokens": "8"},
    "generate": {"model": "@model", "prompt": "hello", "sampling.max_tokens": "8"},
    "chat": {"model": "@model", "sampling.max_tokens": "8"},
    "serve": {"model": "@model", "port": "0"},
    "fuse": {"model": "@model", "adapter": "@style", "out": "@out", "check": "false"},
    "merge": {"adapter": "@style @facts", "out": "@out"},
    "export": {"model": "@model", "to": "hf", "out": "@out", "check": "false"},
    "import": {"source": "@stock", "model": "@model", "out": "@out", "mlx_lm.scale": "2"},
    "upload": {"source": "@style", "repo": "me/it", "dry_run": "true"},
    "report": {"runs": "@run", "out": "@out.html"},
    "completion": {"shell": "bash"},
}  # fmt: skip

EYE = {
    "demo": "demo", "convert": "writes", "data check": "check", "data convert": "convert_data", "plan": "plan",
    "tune": "tune", "train": "train", "eval": "result", "compare": "compare", "generate": "result", "chat": "chat",
    "serve": "serve", "fuse": "writes", "merge": "writes", "export": "writes", "import": "writes", "upload": "uploads",
    "report": "reports", "completion": "result",
}  # fmt: skip

# ---- options that several verbs share: what they are set to, where only that they arrive is looked at ---------------

SAMPLES = {
    "max_length": "40", "min_length": "20", "too_long": "drop", "loss_on": "last", "thinking": "strip",
    "packing": "true", "template": "chatml", "prompts": "plain", "preference": "chosen", "date": "2025-01-01",
    "format": "text", "columns": '{"completion":"reply"}', "validation": "@more", "validation_split": "0.5",
    "validation_rows": "1", "window": "32", "stride": "16", "sample_start": "## P", "keep_sample_start": "false",
    "fill": "true", "append_eos": "false", "end_turns": "true", "prepend_bos": "true", "allow_unusable": "true",
    "cache": "@folder",
}  # fmt: skip
ADAPTER = {
    "type": "dora", "rank": "3", "alpha": "5", "dropout": "0.5", "targets": "q_proj", "layers": "1", "rslora": "true",
    "rank_pattern": '{"q_proj":1}', "alpha_pattern": '{"q_proj":1}',
}  # fmt: skip
OPTIMIZER = {
    "name": "lion", "learning_rate": "0.5", "betas": "[0.1,0.2]", "eps": "0.1", "weight_decay": "0.5",
    "decay_min_dims": "0", "lora_plus_ratio": "4", "schedule": "linear", "warmup_ratio": "0.5", "warmup_steps": "2",
    "min_learning_rate": "0.0001", "max_grad_norm": "0.1",
}  # fmt: skip
RESTARTS = {"cycles": "2", "cycle_growth": "2"}
UNTOLD = {"validation_split", "packing"}  # eval and compare look at all rows, and one by one


def shared(verb: str, group: str, values: dict[str, str], changes: str, eye: str | None = None) -> list[Row]:
    """The same view differs by every option of a group."""
    return [row(verb, f"{group}.{name}", value, changes, eye) for name, value in values.items()]
