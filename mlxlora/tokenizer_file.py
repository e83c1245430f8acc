"""tokenizer.json, looked through before the `tokenizers` library allocates what stands in it.

The library trusts the file: a token id of two thousand million makes it ask for gigabytes, and it ends the process when
it does not get them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
