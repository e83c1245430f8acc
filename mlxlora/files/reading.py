"""Text files that others wrote, read with care: JSON, YAML, and the hash of any file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mlxlora.errors import InputError

MAX_JSON = 1_000_000_000  # bytes; the largest tokenizer.json known is below 50 MB
MAX_YAML = 1_000_000  # bytes
GIVEN = ("/dev/", "/proc/")  # where a shell puts what it was given on purpose: <(command)
MAX_YAML_NODES = 100_000  # after aliases are followed


def read_text(path: Path, *, limit: int = MAX_JSON, error: type[InputError] = InputError) -> str:
    """A UTF-8 text file (with or without a byte order mark), or InputError: missing, no file, too large, not UTF-8."""
    return _decode(_read_bytes(Path(path), limit, error), path, error)


def _read_bytes(path: Path, limit: int, error: type[InputError]) -> bytes:
    if path.is_fifo() and not str(path).startswith(GIVEN):  # opening one waits until somebody writes, maybe for ever
        raise error(f"{path} is a named pipe, not a file.")
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise error(f"{path} does not exist.") from None
    except IsADirectoryError:
        raise error(f"{path} is a directory, not a file.") from None
    except PermissionError:
        raise error(f"{path} may not be read (permission denied).") from None
    if len(content) > limit:
        raise error(f"{path} is larger than the {limit} bytes that such a file may have.")
    return content


def _decode(content: bytes, path: Path, error: type[InputError]) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        raise error(f"{path} is not UTF-8 text (byte {wrong.start}).") from None


def read_json(path: Path, *, unique: bool = False) -> Any:
    """Read a JSON file. Raises InputError that names the file and the line.

    unique: refuse an object that has a key twice (JSON itself takes the last)
    """
    return parse_json(_read_bytes(Path(path), MAX_JSON, InputError), Path(path), unique=unique)


def parse_json(
    content: bytes, path: Path, *, what: str = "JSON", unique: bool = False, error: type[InputError] = InputError
) -> Any:
    """The value of JSON text that was read from `path`, or an `error` naming file and line."""
    try:
        return json.loads(_decode(content, path, error), object_pairs_hook=_unique if unique else None)
    except json.JSONDecodeError as wrong:
        raise error(f"{path}:{wrong.lineno}: not valid {what}: {wrong.msg}.") from None
    except RecursionError:
        raise error(f"{path}: {what} nested too deeply.") from None
    except ValueError as wrong:  # a key twice, or a number of thousands of digits
        raise error(f"{path}: not valid {what}: {wrong}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return found


def read_yaml(path: Path) -> Any:
    """Read a YAML file by the safe loader. Raises InputError that names the file and the line.

    Refused: tags that build Python objects, a key that occurs twice, more than one document, aliases that refer to
    themselves or blow up. `1e-5` is a number here, as everyone expects (YAML 1.1 wants `1.0e-5`).
    """
    import yaml

    path = Path(path)
    text = read_text(path, limit=MAX_YAML)
    try:
        loader = _yaml_loader()(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_yaml(node, path)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as wrong:
        line = wrong.problem_mark.line + 1 if wrong.problem_mark else 1
        raise InputError(f"{path}:{line}: not valid YAML: {wrong.problem}.") from None
    except (yaml.YAMLError, ValueError) as wrong:
        raise InputError(f"{path}: not valid YAML: {str(wrong).splitlines()[0]}.") from None
    except RecursionError:
        raise InputError(f"{path}: YAML nested too deeply.") from None


def _yaml_loader() -> Any:
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, with floats as everyone writes them. A class of its own: the library's stays untouched."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )
    return Loader


def _check_yaml(root: Any, path: Path) -> None:
    """Refuse keys that occur twice and aliases that multiply; the size of each node is counted once."""
    import yaml

    sizes: dict[int, int | None] = {}

    def size(node: Any) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise InputError(f"{path}:{node.start_mark.line + 1}: a YAML alias that refers to itself.")
            return known
        sizes[id(node)] = None
        total = 1
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if name and name in seen and name[1] != "<<":
                    raise InputError(f"{path}:{key.start_mark.line + 1}: the key '{key.value}' occurs twice.")
                seen.add(name)
                total += size(key) + size(value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(size(item) for item in node.value)
        if total > MAX_YAML_NODES:
            raise InputError(f"{path}: YAML of more than {MAX_YAML_NODES} values once its aliases are followed.")
        sizes[id(node)] = total
        return total

    size(root)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
