"""The questions are what the demo says of them: repeatable, telling, and held out in every name."""

import hashlib
import re
from itertools import islice

import pytest

from mlxlora.demo import corpus, names, questions
from mlxlora.demo.score import Row, is_right, results_agree, run_query


@pytest.fixture(scope="module")
def held_out() -> list[questions.Question]:
    return questions.held_out_questions(150, seed=3)


@pytest.fixture(scope="module")
def training() -> list[questions.Question]:
    return questions.training_questions(300, seed=3)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_the_same_seed_asks_the_same() -> None:
    assert questions.held_out_questions(5, seed=7) == questions.held_out_questions(5, seed=7)
    assert questions.held_out_questions(5, seed=7) != questions.held_out_questions(5, seed=8)
    assert questions.training_questions(5, seed=7) == questions.training_questions(5, seed=7)
    assert list(corpus.documents(1, 5)) == list(corpus.documents(1, 5)) != list(corpus.documents(2, 5))


def test_topics_share_no_word() -> None:
    known = set().union(*(topic.words for topic in names.TRAINING))
    assert len(known) > 250 and len(names.held_out_words()) > 200
    assert not known & names.held_out_words()


def test_training_and_pretraining_hold_no_held_out_name(training: list[questions.Question]) -> None:
    seen = set().union(*(words(f"{question.prompt} {question.sql}") for question in training))
    seen |= set().union(*(words(document) for document in islice(corpus.documents(0), 2_000)))
    assert not seen & names.held_out_words()


def test_held_out_questions_hold_only_held_out_names(held_out: list[questions.Question]) -> None:
    for question in held_out:
        for table in question.tables:
            assert {table.name, *dict(table.columns)} <= names.held_out_words()
            for column in table.named("text"):
                values = {str(row[table.position(column)]).lower() for row in table.rows}
                assert values <= names.held_out_words()


def test_every_kind_is_asked(held_out: list[questions.Question]) -> None:
    kinds = {question.query.kind for question in held_out}
    assert kinds == {*questions.KINDS, "join"}
    for piece in (" AND ", " OR ", "GROUP BY", "ORDER BY", "LIMIT", "DISTINCT", "JOIN", "avg(", "sum(", "max(", "!="):
        assert any(piece in question.sql for question in held_out), piece


def test_gold_answers_tell_right_from_wrong(held_out: list[questions.Question]) -> None:
    for question in held_out:
        gold = run_query(question.tables, question.sql)
        assert gold and gold not in ([(None,)], [(0,)])
        assert is_right(question.tables, question.sql, question.sql)
        for near in question.query.neighbours():
            assert not is_right(question.tables, question.sql, near.sql()), (question.text, near.sql())


def test_answers_of_other_questions_are_wrong(held_out: list[questions.Question]) -> None:
    asked_of = {question.tables: question for question in held_out}.values()
    guesses = ["SELECT * FROM {t}", "SELECT count( * ) FROM {t}", "SELECT 1"]
    right = sum(is_right(q.tables, q.sql, guess.format(t=q.tables[0].name)) for q in asked_of for guess in guesses)
    assert right <= 2


def test_no_chat_in_the_corpus_answers_with_sql() -> None:
    chats = [document for document in corpus.documents(4, 1_000) if corpus.TURN in document]
    assert len(chats) > 200
    assert not any("SELECT" in chat for chat in chats)


def test_order_counts_only_where_it_is_asked_for() -> None:
    one: list[Row] = [(1,), (2,)]
    two = one[::-1]
    assert results_agree(one, two, ordered=False)
    assert not results_agree(one, two, ordered=True)
    assert results_agree([(0.1 + 0.2,)], [(0.3,)], ordered=True)
    assert not results_agree([(1,)], [("1",)], ordered=False)


def test_the_corpus_is_still_the_one_that_made_the_model() -> None:
    """Change the generator and the shipped weights are no longer what it makes: train them again."""
    text = "\n".join(corpus.documents(1, 100))
    assert hashlib.sha256(text.encode()).hexdigest().startswith("9587d9bd3958d49b")
