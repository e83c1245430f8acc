"""The files of a tokenizer, looked through before `tokenizers` and transformers believe them.

The libraries trust tokenizer.json: a token id of two thousand million makes them ask for gigabytes, and end the process
when they do not get them.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mlxlora.architecture import lies_inside
from mlxlora.errors import ModelError, Problem
from mlxlora.files import read_json

LARGEST_ID = 4_000_000  # the largest vocabulary known has 262,144 tokens


def check_tokenizer_file(path: Path) -> None:
    """Raise ModelError when a tokenizer.json is no JSON object, or holds token ids that cannot be meant."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ModelError(f"{path} is no tokenizer: expected a JSON object with a 'model'.")
    problems = _wrong_vocabulary(content["model"].get("vocab"))
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        problems.append(Problem("added_tokens", "expected a list"))
    else:
        problems += [
            Problem(f"added_tokens[{number}]", "expected an object with a text and an id that can be meant")
            for number, token in enumerate(added)
            if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not _is_id(token.get("id"))
        ]
    if problems:
        raise ModelError.of(f"{path} cannot be used:", problems)


def _wrong_vocabulary(vocabulary: Any) -> list[Problem]:
    if isinstance(vocabulary, dict):
        wrong = [token for token, number in vocabulary.items() if not _is_id(number)]
        return [Problem(f"token {token[:40]!r}", f"has the id {str(vocabulary[token])[:40]}") for token in wrong]
    if isinstance(vocabulary, list):
        wrong_rows = [n for n, row in enumerate(vocabulary) if not isinstance(row, list) or len(row) != 2]
        return [Problem(f"vocab[{number}]", "expected a token and its score") for number in wrong_rows]
    return [Problem("vocab", "expected an object or a list")]


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_ID


def check_own_code(directory: Path) -> None:
    """Name the files of a tokenizer that may run code of its own; raise ModelError for code outside of its directory.

    transformers would fetch `other/repository--file.Class` from the hub and run it: more than was agreed to.
    """
    problems = []
    named: dict[str, None] = {}
    for name in ("tokenizer_config.json", "config.json"):
        path = Path(directory) / name
        content = read_json(path) if path.is_file() else {}
        references = content.get("auto_map") if isinstance(content, dict) else None
        if references is None:
            continue
        if isinstance(references, list):  # an old spelling: the tokenizer's alone
            references = {"AutoTokenizer": references}
        if not isinstance(references, dict):
            problems.append(Problem(f"{name}: auto_map", "expected an object"))
            continue
        for kind in ("AutoTokenizer", "AutoConfig"):
            given = references.get(kind)
            for reference in given if isinstance(given, list) else [given]:
                if reference is None:
                    continue
                if _lies_inside(Path(directory), reference):
                    named[f"{reference.partition('.')[0]}.py"] = None
                else:
                    what = f"{str(reference)[:80]!r} is no Python file in the model directory"
                    problems.append(Problem(f"{name}: auto_map: {kind}", what))
    if problems:
        raise ModelError.of(f"{directory} wants to run code from elsewhere, which is never done:", problems)
    for name in named:
        logging.getLogger("mlxlora").warning("running the tokenizer's own code: %s", Path(directory) / name)


def _lies_inside(directory: Path, reference: Any) -> bool:
    if not isinstance(reference, str) or not re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", reference):
        return False
    name = f"{reference.partition('.')[0]}.py"
    return (directory / name).is_file() and lies_inside(directory, name)
