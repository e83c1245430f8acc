"""`kill -9` inside verbs that write: all of it is there or nothing; the next call makes it and clears up."""

import random
import re
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mlxlora.files import sha256
from tests.faults import makers, session


def tree(path: Path) -> dict[str, str]:
    """Every file of what was made, by the hash of its bytes."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path)): sha256(one) for one in files}


def begin(name: str, place: Path, work: Path) -> BaseProcess:
    """Begin the verb, and wait until it writes."""
    process = session.begin(makers.make, name, place, work)
    before = set(work.iterdir())
    while process.exitcode is None and set(work.iterdir()) <= before:
        time.sleep(0.001)
    return process


def finish(name: str, place: Path, work: Path) -> float:
    """Let the verb come to its end. Returns the seconds from the first that it wrote."""
    process = begin(name, place, work)
    begun = time.monotonic()
    process.join()
    assert process.exitcode == 0, name
    return time.monotonic() - begun


def kills(folder: Path, names: list[str], each: int, enough: float) -> None:
    place = makers.prepare(folder / "prepared", names)
    chosen = random.Random(29)
    total = inside = 0
    for name in names:
        work = folder / re.sub(r"\W+", "-", name)
        out = makers.target(name, work)
        work.mkdir()
        seconds = finish(name, place, work)
        expected = tree(out)
        for _ in range(each):
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
            process = begin(name, place, work)
            time.sleep(chosen.random() * seconds)
            process.kill()
            process.join()
            total += process.exitcode == -9
            inside += not out.exists()
            assert not out.exists() or tree(out) == expected, name
            assert all(path == out or path.name.startswith(f".{out.name}.tmp-") for path in work.iterdir()), name
            if chosen.random() < 0.5 and not out.exists():  # else the next kill finds what this one left
                finish(name, place, work)
                assert tree(out) == expected and list(work.iterdir()) == [out], name
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        finish(name, place, work)
        assert tree(out) == expected and list(work.iterdir()) == [out], name
    print(
        f"{total} kills of {len(names)} verbs that write, {inside} of them before the result was there: all of it or"
        " nothing, the next call makes it byte for byte, and nothing else is left"
    )
    assert inside >= enough * each * len(names), "too few kills met the work"


def test_kills_inside_verbs_short(tmp_path: Path) -> None:
    kills(tmp_path, ["merge", "export --to gguf", "data convert", "data convert --out out.jsonl"], each=1, enough=0)


@pytest.mark.faults
def test_kills_inside_verbs_long(tmp_path: Path) -> None:
    kills(tmp_path, makers.possible(), each=6, enough=0.4)
