"""The page of refusals says what the tests try."""

from tests import refusals


def test_the_page_is_that_of_the_tables():
    assert refusals.PAGE.read_text() == refusals.page(), "python -m tests.refusals"


def test_a_sentence_is_readable():
    assert refusals.words(r"--ranks is 10000.*gives \d+ cores?\.") == (
        "--ranks is 10000 ... gives ... cores."
    )


def test_there_are_many_of_each_kind():
    assert min(map(len, refusals.AREAS.values())) >= 20
    assert sum(map(len, refusals.AREAS.values())) >= 120
