"""The files of a tokenizer, looked through before `tokenizers` and transformers believe them.

The libraries trust tokenizer.json: a token id of two thousand million makes them ask for gigabytes, and end the process
when they do not get them.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlxlora.architecture import lies_inside
from mlxlora.errors import ModelError, Problem
from mlxlora.files import read_json

LARGEST_ID = 4_000_000  # the largest vocabulary known has 262,144 tokens
LONGEST_TOKEN, ALL_TOKENS = 1000, 2_000_000  # characters of one added token, and of all of them
STAGES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MOST_PARTS = 1000  # values that one of them is made of; known ones have a few dozen
LONGEST_PATTERN = 20_000  # characters; known ones have a few hundred
MOST_GROWTH = 1_000_000  # how many times longer a few characters may become at most, should every part meet them
LENGTHS = (4, 8, 12, 16, 20, 24, 32, 64, 256, 1024)  # of the texts that are tried
SLOW = 0.3  # seconds of the processor for one of them


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
            if not isinstance(token, dict) or not _is_token(token.get("content")) or not _is_id(token.get("id"))
        ]
        if not problems and sum(len(token["content"]) for token in added) > ALL_TOKENS:
            problems.append(Problem("added_tokens", f"together longer than {ALL_TOKENS:,} characters"))
    problems += [problem for name in STAGES for problem in _wrong_stage(name, content.get(name))]
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


def _wrong_stage(name: str, stage: Any) -> list[Problem]:
    """What of a step of the tokenizer would take the memory, or the time, of the machine."""
    parts, growth, waiting = 0, 1, [stage]
    while waiting and parts <= MOST_PARTS:
        part = waiting.pop()
        parts += 1
        if isinstance(part, dict):
            growth *= _growth(part)
            waiting += [value for key, value in part.items() if key != "precompiled_charsmap"]
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, str) and len(part) > LONGEST_PATTERN:
            return [Problem(name, f"holds a pattern of {len(part):,} characters; {LONGEST_PATTERN:,} are allowed")]
    if parts > MOST_PARTS:
        return [Problem(name, f"is made of more than {MOST_PARTS:,} parts")]
    if growth > MOST_GROWTH:
        return [Problem(name, f"may make a text more than {MOST_GROWTH:,} times longer")]
    return []


def _growth(part: dict[str, Any]) -> int:
    """How many times longer one part of a step can make a text."""
    match part.get("type"):
        case "Replace":
            return max(1, len(str(part.get("content", ""))))
        case "Prepend":
            return 1 + len(str(part.get("prepend", "")))
        case "ByteLevel":
            return 2
        case _:
            return 1


def check_speed(backend: Any, path: Path) -> None:
    """Raise ModelError for a tokenizer whose patterns take time without bound: longer and longer texts are tried."""
    for length in LENGTHS:
        for text in ("a" * length + "!", " " * length + "x", "Some words 123. " * (length // 16), "\n" * length):
            started = time.thread_time()  # others of this process may be at work meanwhile
            with panics(path):
                backend.encode(text, add_special_tokens=False)
            seconds = time.thread_time() - started
            if seconds > SLOW:
                raise ModelError(
                    f"{path}: this tokenizer takes {seconds:.1f} s for {len(text)} characters: a pattern in its "
                    "tokenizer.json tries too much. Take the file from its source again."
                )


@contextmanager
def panics(path: Path | None) -> Iterator[None]:
    """Raise ModelError in place of what the tokenizers library throws beside all exceptions: a panic in Rust."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip().splitlines() or ["it gives up"])[0]
        where = path or "the tokenizer"
        raise ModelError(f"{where}: this tokenizer cannot take the text: {reason}") from None


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TOKEN


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
