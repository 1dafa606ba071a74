"""Captions cut into chunks that fit, at the best border there is. The ids themselves: tests of ViCLIP."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hedwig.models.text import chunk_caption, count_tokens


def at_most(num_words: int):
    return lambda text: len(text.split()) <= num_words


def test_sentences_are_packed_and_never_cut_if_they_fit() -> None:
    text = "One two. Three four five! Six? Seven eight nine ten. Eleven."
    assert chunk_caption(text, at_most(6)) == ["One two. Three four five! Six?", "Seven eight nine ten. Eleven."]
    assert chunk_caption(text, at_most(5)) == ["One two. Three four five!", "Six? Seven eight nine ten.", "Eleven."]
    assert chunk_caption(text, at_most(99)) == [text]


def test_a_long_sentence_is_cut_after_clauses_then_between_words() -> None:
    text = "A b, c d e f; g. H i j k l m n."
    assert chunk_caption(text, at_most(4)) == ["A b,", "c d e f;", "g.", "H i j k", "l m n."]
    assert chunk_caption("a b c, d", at_most(2)) == ["a b", "c, d"]


def test_a_long_word_is_cut_in_its_middle() -> None:
    assert chunk_caption("abcdefgh ij", lambda text: len(text) <= 4) == ["abcd", "efgh", "ij"]


def test_scripts_without_spaces_have_sentences_too() -> None:
    text = "赤い屋根の家。左側通行、広い道。"
    assert chunk_caption(text, lambda text: len(text) <= 9) == ["赤い屋根の家。", "左側通行、広い道。"]


def test_nothing_stays_nothing() -> None:
    assert chunk_caption("", at_most(1)) == [""]
    assert chunk_caption("x" * 3, lambda text: False) == ["x", "x", "x"]


@given(st.text(alphabet="ab c,.!\n;", max_size=60), st.integers(1, 9))
def test_no_letter_is_lost_or_moved(text: str, room: int) -> None:
    chunks = chunk_caption(text, lambda some: len(some) <= room)
    assert "".join("".join(chunks).split()) == "".join(text.split())
    assert all(len(chunk) <= room for chunk in chunks)


def test_with_clips_own_tokens() -> None:
    text = "Low white houses with red tiled roofs line a narrow street. " * 8
    chunks = chunk_caption(text, lambda some: count_tokens(some) <= 30)
    assert [count_tokens(chunk) for chunk in chunks] == [26] * 4
    assert " ".join(chunks) == text.strip()
