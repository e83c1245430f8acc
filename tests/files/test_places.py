"""What is said of a place where nothing can be written, and with which exit code."""

import errno
import os
from pathlib import Path

import pytest

from mlxlora.errors import InputError
from mlxlora.files import refusal_of, refuse_no_page, refuse_unmakeable, write_whole


def test_what_can_be_made_is_let_through(tmp_path: Path) -> None:
    refuse_unmakeable(tmp_path / "new" / "deep" / "file")
    refuse_no_page(tmp_path / "new" / "page.html")
    write_whole(tmp_path / "new" / "page.html", "x")
    assert (tmp_path / "new" / "page.html").read_text() == "x"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "new", tmp_path / "file" / "new" / "deep"):
        with pytest.raises(InputError, match=r"file is a file"):
            refuse_unmakeable(target)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_may_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match="may not be written"):
        refuse_unmakeable(tmp_path / "closed" / "new")


def test_a_page_is_no_place_for_data(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "page", "page.html.txt"):
        with pytest.raises(InputError, match=r"\.html"):
            refuse_no_page(tmp_path / name)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        refuse_no_page(tmp_path / "folder.html")


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [
        (errno.EISDIR, 2, "is a directory"),
        (errno.ENOENT, 2, "No such file"),
        (errno.EACCES, 2, "permissions"),
        (errno.EROFS, 2, "Read-only"),
        (errno.EIO, 1, "Input/output error"),
        (errno.EMFILE, 1, "Too many open files"),
    ],
)
def test_whose_fault_it_is_decides_the_exit_code(tmp_path: Path, code: int, exit_code: int, words: str) -> None:
    refusal = refusal_of(OSError(code, os.strerror(code), str(tmp_path / ".target.tmp-x1y2")))
    assert refusal.exit_code == exit_code and words in str(refusal)
    assert str(tmp_path / "target") in str(refusal) and ".tmp-" not in str(refusal)


@pytest.mark.parametrize(
    ("scratch", "meant"),
    [
        (".target.tmp-x1y2", "target"),
        (".rows.jsonl.tmp-x1y2/rows.jsonl", "rows.jsonl"),  # a file has its own name in its scratch
        (".target.tmp-x1y2/part/rows.jsonl", "target/part/rows.jsonl"),
        ("a.tmp-b", "a.tmp-b"),
    ],
)
def test_nobody_is_told_of_scratch(tmp_path: Path, scratch: str, meant: str) -> None:
    said = str(refusal_of(OSError(errno.EIO, "Input/output error", str(tmp_path / scratch))))
    assert said == f"{tmp_path / meant}: Input/output error."


def test_without_a_place_no_other_place_is_advised() -> None:
    assert str(refusal_of(TimeoutError("it took too long"))) == "it took too long."
