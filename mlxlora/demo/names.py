"""The names that tables, columns and values carry: topics to train on, topics held out, and invented words.

The held-out topics share no word with the training topics, and an invented word that happens to be one of theirs
is thrown away, so nothing the model ever saw in training (its tokenizer included) holds a held-out name.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class Topic:
    """What one table can be about.

    table:   its name
    texts:   text columns, each with values to fill it with
    numbers: names of its columns of whole numbers
    """

    table: str
    texts: dict[str, tuple[str, ...]]
    numbers: tuple[str, ...]

    @property
    def words(self) -> set[str]:
        """Every name and value of the topic, in lower case."""
        values = {value.lower() for column in self.texts.values() for value in column}
        return {self.table, *self.texts, *self.numbers} | values


def _read(part: str) -> tuple[Topic, ...]:
    topics = tomllib.loads(resources.files("mlxlora.demo").joinpath("topics.toml").read_text(encoding="utf-8"))[part]
    return tuple(
        Topic(
            table,
            {column: tuple(values.split()) for column, values in topic["texts"].items()},
            tuple(topic["numbers"].split()),
        )
        for table, topic in topics.items()
    )


TRAINING = _read("training")
HELD_OUT = _read("held_out")

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ONSETS, _VOWELS, _CODAS, _ENDINGS, _BEGINNINGS = (
    tuple(letters.split())
    for letters in (
        "b c d f g h j k l m n p r s t v w x y z bl br ch cl cr dr fl fr gl gr pl pr qu sc sh sk sl sp st str th tr wh",
        "a e i o u a e i o u a e i o ai au ea ee ei ia ie io oo ou ua",
        "b c d g k l m n p r s t n r l s t x y ck ct ff ft ld ll lt mp nd ng nk nt rd rg rk rm rn rt sh sk ss st th tt",
        "s s s er er or ing ion ity age ent ant al el en le ure ist um us ia a o y ive ate ier ment ness",
        "in of for the at is or and by be per to un ex con de re pro com over under "
        "if when what how all are an as on it",
    )
)


@cache
def held_out_words() -> frozenset[str]:
    """Every word that no training text may hold, in lower case."""
    return frozenset().union(*(topic.words for topic in HELD_OUT))


def invented_word(rng: random.Random, pieces: Sequence[str] = ()) -> str:
    """A word that looks more or less like English and is no held-out name.

    Most are one to three syllables. Some begin as the words of a sentence do (`in…`, `of…`), so that such a beginning
    is copied too; some are mere letters, so that no spelling is out of reach. Where `pieces` of a vocabulary are given,
    half of the words are put together from them, so that each stands in every place of a word.
    """
    while True:
        if pieces and rng.random() < 0.5:
            word = "".join(rng.choice(pieces) for _ in range(rng.choice((1, 2, 2, 3))))
        elif (draw := rng.random()) < 0.08:
            word = "".join(
                rng.choice(_VOWELS)[0] if rng.random() < 0.4 else rng.choice(_LETTERS) for _ in range(rng.randint(3, 8))
            )
        else:
            word = rng.choice(_BEGINNINGS) if draw < 0.2 else rng.choice(_VOWELS)[0] if draw < 0.35 else ""
            word += "".join(_syllable(rng) for _ in range(rng.choice((1, 1, 2, 2, 2, 3))))
            word += rng.choice(_ENDINGS) if rng.random() < 0.5 else ""
        if 3 <= len(word) <= 11 and word not in held_out_words():
            return word


def _syllable(rng: random.Random) -> str:
    coda = rng.choice(_CODAS) if rng.random() < 0.6 else ""
    return (rng.choice(_ONSETS) if rng.random() < 0.95 else "") + rng.choice(_VOWELS) + coda


def invented_topic(rng: random.Random, pieces: Sequence[str] = ()) -> Topic:
    """A table about nothing: three text columns with four to six values each, and three columns of numbers."""
    words: list[str] = []
    while len(words) < 25:
        word = invented_word(rng, pieces)
        if word not in words:
            words.append(word)
    names, values = words[:7], [word.capitalize() for word in words[7:]]
    texts = {column: tuple(values[6 * index : 6 * index + 6]) for index, column in enumerate(names[1:4])}
    return Topic(names[0], texts, tuple(names[4:]))


def mixed_topic(rng: random.Random, topics: tuple[Topic, ...] = TRAINING) -> Topic:
    """Names of several topics thrown together, so that a column tells nothing about the table it stands in."""
    texts: dict[str, tuple[str, ...]] = {}
    numbers: list[str] = []
    while len(texts) < 3:
        column, values = rng.choice(list(rng.choice(topics).texts.items()))
        texts[column] = values
    while len(numbers) < 3:
        number = rng.choice(rng.choice(topics).numbers)
        if number not in numbers:
            numbers.append(number)
    return Topic(rng.choice(topics).table, texts, tuple(numbers))
