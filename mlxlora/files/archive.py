"""ZIP archives that others made: members stay below their folder, and do not grow without bound."""

from __future__ import annotations

import contextlib
import errno
import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from mlxlora.errors import FormatError, InputError, Problem
from mlxlora.files.space import human_bytes

MAX_MEMBERS = 10_000
MAX_BYTES = 20_000_000_000  # unpacked, all members together
MAX_RATIO = 200  # unpacked : packed; text that was written by people stays below 20
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # the others may ask for gigabytes to unpack a byte
DAMAGE = (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, ValueError, struct.error, zlib.error)
RATIO_FROM = 10_000_000  # bytes; small members may be as repetitive as they like


def zip_members(path: Path, *, max_bytes: int = MAX_BYTES) -> Iterator[tuple[str, BinaryIO]]:
    """Yield (name, open file) for each file in a ZIP archive, after all names and sizes have been checked.

    A member never yields more bytes than its entry declares (zipfile stops there, and compares the CRC).
    Raises FormatError naming every member that is absolute, climbs out (`..`), is a link, is encrypted, occurs twice or
    expands beyond measure, and when the archive is damaged.
    """
    path = Path(path)
    with _open(path) as archive:
        members = _checked(path, archive, max_bytes)
        for member in members:
            with io.BufferedReader(_Member(path, archive, member)) as file:
                yield member.filename, cast(BinaryIO, file)


class _Member(io.RawIOBase):
    """One file of an archive, whose damage is told as a FormatError wherever it shows."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        self._where = f"{path}: {member.filename}"
        with self._told():
            self._file = archive.open(member)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except DAMAGE as error:
            raise FormatError(f"{self._where}: damaged: {error}.") from None
        except OSError as error:
            if error.errno != errno.EINVAL:  # an offset that lies leads to a seek that cannot be
                raise
            raise FormatError(f"{self._where}: damaged: {error}.") from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._told():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (*DAMAGE, OSError) as error:
        raise FormatError(f"{path} is not a sound ZIP archive: {error}.") from None


def _checked(path: Path, archive: zipfile.ZipFile, max_bytes: int) -> list[zipfile.ZipInfo]:
    """The files of the archive (no directories), or FormatError with everything that is wrong with them."""
    entries = archive.infolist()
    if len(entries) > MAX_MEMBERS:
        raise FormatError(f"{path} has {len(entries)} members, more than the {MAX_MEMBERS} that are read.")
    problems = []
    seen: set[str] = set()
    for entry in entries:
        wrong = _wrong_member(entry)
        if entry.filename.casefold() in seen:  # the Mac's file system does not tell A from a
            wrong = "occurs twice"
        seen.add(entry.filename.casefold())
        if wrong:
            problems.append(Problem(repr(entry.filename[:200]), wrong))
    total = sum(entry.file_size for entry in entries)
    if total > max_bytes:
        problems.append(Problem("", f"unpacks to {human_bytes(total)}, more than {human_bytes(max_bytes)}"))
    if problems:
        raise FormatError.of(f"{path} is refused:", problems)
    return [entry for entry in entries if not entry.is_dir()]


def _wrong_member(entry: zipfile.ZipInfo) -> str:
    name = PurePosixPath(entry.filename)
    if name.is_absolute() or ".." in name.parts or "\\" in entry.filename or ":" in entry.filename or not name.parts:
        return "a name that leaves the folder"
    if any(ord(letter) < 32 for letter in entry.filename):
        return "a name with control characters"
    mode = entry.external_attr >> 16
    if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or a special file"
    if entry.flag_bits & 0x1:
        return "encrypted"
    if entry.compress_type not in METHODS:
        return f"compressed by method {entry.compress_type}; only deflate and stored are read"
    if entry.file_size > RATIO_FROM and entry.file_size > MAX_RATIO * max(entry.compress_size, 1):
        return f"expands from {human_bytes(entry.compress_size)} to {human_bytes(entry.file_size)}"
    return ""
