"""JSON and YAML that others wrote."""

import os
from pathlib import Path

import pytest

from mlxlora.errors import InputError
from mlxlora.files import read_json, read_text, read_yaml


def yaml(tmp_path: Path, text: str) -> Path:
    (tmp_path / "c.yaml").write_text(text)
    return tmp_path / "c.yaml"


def test_yaml_values(tmp_path: Path) -> None:
    text = "rate: 1e-5\nratio: .5e1\nname: 1e\nn: 3\n"
    text += "items: &a [1, two]\nagain: *a\nbase: &b {x: 1}\nmerged: {<<: *b, y: 2}\n"
    assert read_yaml(yaml(tmp_path, text)) == {
        "rate": 1e-5, "ratio": 5.0, "name": "1e", "n": 3, "items": [1, "two"], "again": [1, "two"],
        "base": {"x": 1}, "merged": {"x": 1, "y": 2},
    }  # fmt: skip
    assert read_yaml(yaml(tmp_path, "")) is None


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "c.yaml:3: the key 'a' occurs twice"),
        ("a: !!python/object/apply:os.system ['true']\n", "c.yaml:1: not valid YAML"),
        ("a: [1\nb: 2\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: &a [*a]\n", "refers to itself"),
        (BOMB, "once its aliases are followed"),
        ("[" * 5000, "YAML"),
        ("a: *nothing\n", "not valid YAML"),
        ("x" * 1_000_001, "larger than"),
        ("a: \x00\n", "not valid YAML"),
    ],
)
def test_yaml_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_yaml(yaml(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', "c.json:2: not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b"1" * 10_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
    ],
)
def test_json_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "c.json", unique=True)


def test_nobody_waits_for_a_pipe_that_stands_where_a_file_should(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "adapter_config.json")
    for read in (read_json, read_yaml, read_text):
        with pytest.raises(InputError, match="is a named pipe"):
            read(tmp_path / "adapter_config.json")


def test_what_a_shell_hands_over_as_a_pipe_is_read(tmp_path: Path) -> None:
    """`--config <(command)`."""
    reading, writing = os.pipe()
    os.write(writing, b"a: 1\n")
    os.close(writing)
    try:
        assert read_yaml(Path(f"/dev/fd/{reading}")) == {"a": 1}
    finally:
        os.close(reading)
