"""One LoRA step on a small model of every architecture of mlx-lm, against the plain computation.

python -m tests.architectures.sweep                 all of them; writes docs/architectures.md
python -m tests.architectures.sweep --one qwen3     one, as JSON
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SECONDS = 240


def examine(model_type: str) -> dict[str, Any]:
    """Build, adapt, step; what came out."""
    import mlx.core as mx

    from mlxlora import mlxlm
    from mlxlora.adapters import AdapterConfig, inject
    from mlxlora.engine import Engine, EngineConfig, packing_refusal
    from mlxlora.errors import MlxLoraError
    from mlxlora.objectives import sft
    from mlxlora.parameters import flat
    from tests import reference
    from tests.architectures import small

    mx.random.seed(0)
    try:
        network = mlxlm.build(small.config(model_type))
        mx.eval(network.parameters())
        for path, array in flat(network.parameters()).items():
            if not mx.all(mx.isfinite(array)).item():
                return {"state": "not built", "reason": "its weights start as no numbers"}
            if mx.issubdtype(array.dtype, mx.floating) and not mx.any(array != 0).item():
                noise = 0.1 * mx.random.normal(array.shape).astype(array.dtype)
                network.load_weights([(path, noise)], strict=False)  # zeros would hide what they multiply
        network(mx.zeros((1, 2), mx.int32))
        inject(network, AdapterConfig(rank=4), seed=1)
    except (MlxLoraError, ValueError, TypeError, AttributeError, KeyError, IndexError) as failure:
        lines = str(failure).splitlines() or [type(failure).__name__]
        return {"state": "not built", "reason": lines[0][:160]}
    reference.awaken(network)
    batch = reference.padded(reference.samples([19, 12], 100))
    try:
        value, _, grads = reference.step(network, batch)
    except ValueError as failure:
        return {"state": "not trainable", "reason": f"mlx-lm's model has no gradient: {str(failure)[:120]}"}
    engine = Engine(network, EngineConfig())
    total, _, _, slopes = engine.value_and_grad(sft, batch)
    loss_error = abs(total.item() - value.item()) / abs(value.item())
    gradient_error = reference.gradient_error(slopes, grads)
    right = loss_error < 1e-5 and gradient_error < 1e-3
    notes = " ".join(engine.notes)
    return {
        "state": "right" if right else "wrong",
        "loss_error": loss_error,
        "gradient_error": gradient_error,
        "head": "logits are made" not in notes,
        "blocks": "one graph" not in notes and "logits are made" not in notes,
        "attention": "attention" not in notes,
        "packing": packing_refusal(network),
        "notes": engine.notes,
    }


def _answer(pipe: Connection, model_type: str) -> None:
    try:
        pipe.send(examine(model_type))
    except RuntimeError as failure:  # an operation that this device lacks
        pipe.send({"state": "not built", "reason": str(failure).splitlines()[0][:160]})


def in_process(model_type: str) -> dict[str, Any]:
    """The same in a process of its own: some models call exit() or take minutes to compile."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlx_lm.utils", "mlxlora.engine", "tests.reference"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, model_type))
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return {"state": "not built", "reason": f"took more than {SECONDS} s"}
        found: dict[str, Any] = ours.recv()
        return found
    except EOFError:
        return {"state": "failed", "reason": "the process ended"}
    finally:
        process.kill()
        process.join()


def table(found: dict[str, dict[str, Any]]) -> str:
    """docs/architectures.md."""
    right = [name for name, one in found.items() if one["state"] == "right"]
    lines = [
        "# Architectures",
        "",
        "Written by `python -m tests.architectures.sweep`: a step on a small model of every architecture of mlx-lm,",
        "held against the plain computation (full logits, one graph). Loss within 1e-5, gradients within 1e-3 of it.",
        "",
        "- **head**: only tokens that carry weight reach it, a chunk at a time",
        "- **blocks**: forward and backward block by block, in any grade of recomputation",
        "- **attention**: in memory linear in the number of tokens",
        "- **packing**: several documents in a row, computed as if each stood alone",
        "",
        f"{len(right)} of {len(found)} are right; the rest could not be built from a small configuration.",
        "",
        "| architecture | head | blocks | attention | packing | Δ loss | Δ gradients |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        if one["state"] in ("right", "wrong"):
            marks = [" yes " if one[what] else " " for what in ("head", "blocks", "attention")]
            marks.append(" yes " if one["packing"] is None else " ")
            errors = f"{one['loss_error']:.0e} | {one['gradient_error']:.0e}"
            wrong = "" if one["state"] == "right" else " **(wrong)**"
            lines.append(f"| {name}{wrong} |{'|'.join(marks)}| {errors} |")
    rest = {name: one for name, one in found.items() if one["state"] not in ("right", "wrong")}
    if rest:
        lines += ["", "Not tried:", "", "| architecture | why |", "|---|---|"]
        lines += [f"| {name} | {one['reason'].replace('|', '/')} |" for name, one in rest.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Examine one architecture or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one")
    parser.add_argument("--only", help="names, separated by commas; the others are taken from --results")
    parser.add_argument("--results", type=Path, help="keep what was found in this JSON file")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architectures.md")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(examine(given.one)))
        return 0
    from mlxlora import mlxlm

    found = {}
    if given.results and given.results.exists():
        found = json.loads(given.results.read_text())
    for model_type in given.only.split(",") if given.only else mlxlm.model_types():
        found[model_type] = in_process(model_type)
        print(model_type, found[model_type], flush=True)
    if given.results:
        given.results.write_text(json.dumps(found, indent=1))
    found = dict(sorted(found.items(), key=lambda item: item[0].lower()))
    given.out.write_text(table(found))
    return 1 if any(one["state"] == "wrong" for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
