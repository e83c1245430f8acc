"""ZIP archives: nothing leaves the folder, nothing grows without bound."""

import stat
import zipfile
from pathlib import Path

import pytest

from mlxlora.errors import FormatError
from mlxlora.files import zip_members


def make(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_members(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zip", {"train.jsonl": b"{}\n", "deep/valid.jsonl": b"[]\n", "deep/": b""})
    assert {name: file.read() for name, file in zip_members(path)} == {
        "train.jsonl": b"{}\n",
        "deep/valid.jsonl": b"[]\n",
    }


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil", "C:/evil", "a\x01b"])
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "a.zip", {"fine": b"1", name: b"2"})
    with pytest.raises(FormatError, match="a name"):
        list(zip_members(path))


def test_links_twins_and_bombs(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(FormatError, match="a link"):
        list(zip_members(tmp_path / "link.zip"))
    with pytest.raises(FormatError, match="occurs twice"):
        list(zip_members(make(tmp_path / "twins.zip", {"a": b"1", "A": b"2"})))
    with pytest.raises(FormatError, match="expands from"):
        list(zip_members(make(tmp_path / "bomb.zip", {"a": bytes(20_000_000)})))
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"1")
    with pytest.raises(FormatError, match="method 14"):
        list(zip_members(tmp_path / "lzma.zip"))
    with pytest.raises(FormatError, match="unpacks to"):
        list(zip_members(make(tmp_path / "big.zip", {"a": bytes(2000)}), max_bytes=1000))


def test_damage_is_told(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zip", {"a": bytes(range(256)) * 40})
    raw = bytearray(path.read_bytes())
    raw[60] ^= 0xFF
    (tmp_path / "b.zip").write_bytes(raw)
    with pytest.raises(FormatError):
        [file.read() for _, file in zip_members(tmp_path / "b.zip")]
    (tmp_path / "c.zip").write_bytes(b"PK nothing")
    with pytest.raises(FormatError, match="not a sound ZIP"):
        list(zip_members(tmp_path / "c.zip"))
