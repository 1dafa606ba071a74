"""Kept answers: nothing is lost, and the sums are what was spent."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hedwig.answers import AnswerStore, Kept, answer_key


def test_keys_are_their_parts_in_order():
    assert answer_key("a", 1, None) == answer_key("a", 1, None)
    keys = {answer_key(*parts) for parts in (("a", "b"), ("b", "a"), ("ab",), ("a", ["b"]), ("a", None), ("a", "None"))}
    assert len(keys) == 6
    assert answer_key({"x": 1, "y": 2}) == answer_key({"y": 2, "x": 1})
    assert len(answer_key("half \ud83d")) == 64


def test_answers_come_back_and_costs_add_up(tmp_path):
    store = AnswerStore(str(tmp_path))
    key, other = answer_key("one"), answer_key("two")
    assert store.get(key) == Kept()
    store.put_trouble(key, "empty", {"tokens": 3, "num_troubles": 1})
    assert store.get(key) == Kept(None, [{"tokens": 3, "num_troubles": 1}], "empty")
    store.put(key, {"text": "é \ud83d"}, {"tokens": 4})
    assert AnswerStore(str(tmp_path)).get(key).answer == {"text": "é \ud83d"}
    assert store.get(key).trouble is None
    store.put(other, "x", {"tokens": 5})
    assert store.total() == {"num_attempts": 3, "num_answers": 2, "tokens": 12, "num_troubles": 1}
    assert store.total([key, key, answer_key("three")])["tokens"] == 7
    assert AnswerStore(str(tmp_path / "none")).total() == {"num_attempts": 0, "num_answers": 0}


def test_a_later_failure_never_takes_a_paid_answer_away(tmp_path):
    store = AnswerStore(str(tmp_path))
    store.put("k" * 64, "good", {"tokens": 1})
    store.put_trouble("k" * 64, "a late twin failed", {"tokens": 2})
    assert store.get("k" * 64) == Kept("good", [{"tokens": 1}, {"tokens": 2}], None)
    with pytest.raises(ValueError, match="put_trouble"):
        store.put("k" * 64, None, {})


def test_an_attempt_with_an_id_counts_once(tmp_path):
    store = AnswerStore(str(tmp_path))
    store.put_trouble("k" * 64, "empty", {"tokens": 1, "id": "a"})
    store.put_trouble("k" * 64, "empty", {"tokens": 1, "id": "a"})
    store.put("k" * 64, "good", {"tokens": 5, "id": "b"})
    store.put("k" * 64, "good", {"tokens": 5, "id": "b"})
    assert store.total() == {"num_attempts": 2, "num_answers": 1, "tokens": 6}


def test_a_damaged_object_is_named(tmp_path):
    store = AnswerStore(str(tmp_path))
    store.put("k" * 64, "good", {})
    for damage in ('{"answer": "go', "[1]", '{"text": 1}'):
        (tmp_path / "kk" / f"{'k' * 64}.json").write_text(damage)
        with pytest.raises(ValueError, match=r"kkkk\.json is damaged"):
            store.get("k" * 64)


WORKER = """
import sys
from hedwig.answers import AnswerStore
store = AnswerStore(sys.argv[1])
for number in range(40):
    store.put("k" * 64, number, {"tokens": 1})
"""


def test_two_processes_on_one_question_lose_no_cost(tmp_path):
    jobs = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)]) for _ in range(2)]
    assert [job.wait(100) for job in jobs] == [0, 0]
    assert AnswerStore(str(tmp_path)).total()["tokens"] == 80
