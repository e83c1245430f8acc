"""Damage to files, drawn from a seed: blind (bits, cuts, splices) and knowing (numbers, names and lengths that lie)."""

from __future__ import annotations

import random
import re
import struct

NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63,
    2**64 - 1, 2**64, 10**30, -(2**31), -(2**63),
)  # fmt: skip
WORDS = (
    b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"[]", b"{}", b'""', b'"F64"', b'"F4"', b'"../x"', b'"\\ud800"',
    b"[[[[[[[[", b"}", b",", b'"__metadata__"', b'"a":1,"a":2', b"\xff\xfe", b"\x00", b"*a", b"&a", b"<<",
    b"!!python/name:os", b"1" * 5000,
        b"{% for i in range(10**9) %}x{% endfor %}", b"{{ ''.__class__.__mro__ }}", b"{{ x", b"{% raw",
)  # fmt: skip
NUMBER = re.compile(rb"-?\d+")


def flip(data: bytearray, random: random.Random) -> None:
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def put(data: bytearray, random: random.Random) -> None:
    """Bytes of an integer that overflows something, at a place near the front (where lengths stand)."""
    at = random.randrange(min(len(data), 512) if random.random() < 0.7 else len(data))
    size = random.choice((1, 4, 8))
    data[at : at + size] = struct.pack("<Q", random.choice(NUMBERS) % 2**64)[:size]


def cut(data: bytearray, random: random.Random) -> None:
    at = random.randrange(len(data))
    if random.random() < 0.5:
        del data[at:]
    else:
        del data[at : at + random.choice((1, 2, 8, 100))]


def splice(data: bytearray, random: random.Random) -> None:
    at, start = random.randrange(len(data)), random.randrange(len(data))
    piece = data[start : start + random.choice((1, 8, 64, 500))]
    data[at:at] = piece * random.choice((1, 1, 3))


def word(data: bytearray, random: random.Random) -> None:
    at = random.randrange(len(data))
    chosen = random.choice(WORDS)
    data[at : at + random.choice((0, 1, len(chosen)))] = chosen


def number(data: bytearray, random: random.Random) -> None:
    """A number in text, replaced by one that does not fit."""
    spots = list(NUMBER.finditer(bytes(data[:20_000])))
    if spots:
        spot = random.choice(spots)
        data[spot.start() : spot.end()] = str(random.choice(NUMBERS)).encode()


def lengthened(data: bytearray, random: random.Random) -> None:
    """The header of a safetensors file changed in place, its length set right again: only the content lies."""
    if len(data) < 10 or data[8:9] != b"{":
        return number(data, random)
    size = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + size]
    if not header:
        return None
    random.choice((number, word, flip, splice))(header, random)
    data[: 8 + size] = struct.pack("<Q", len(header)) + header
    return None


MUTATIONS = (flip, put, cut, splice, word, number, lengthened, lengthened)


def mutate(original: bytes, seed: int) -> bytes:
    """A damaged copy of `original`; the same seed gives the same damage, and never the original itself."""
    chosen = random.Random(seed)
    data = bytearray(original)
    while bytes(data) == original or not data:
        if not data:
            data = bytearray(original)
        for _ in range(chosen.choice((1, 1, 1, 2, 3))):
            if data:
                chosen.choice(MUTATIONS)(data, chosen)
    return bytes(data)
