"""Captions by batches: shards within their limits, answers joined by name, nothing created or paid twice."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from fake_openai import FakeOpenAI, short_answer, words_of

from hedwig.answers import AnswerStore
from hedwig.captions.batch import run_batch
from hedwig.captions.dialogue import Shown, show
from hedwig.captions.openai import MAX_PAID, EndpointRefused, OpenAICaptioner
from hedwig.captions.rounds import write_round
from hedwig.captions.spending import spending

KEY = "sk-canary-77"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.setattr("hedwig.web.random.uniform", lambda low, high: 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def pictures(num):
    return np.random.default_rng(0).integers(0, 255, (num, 8, 16, 16, 3), np.uint8)


def rows(num=10, first=0):
    for index, frames in enumerate(pictures(num)):
        yield f"pano|{index + first}", f"{index + first:064x}", frames


def ask(fake, folder, what=None, **changes):
    options = {"folder": str(folder / "batch"), "answers": str(folder / "answers"), "model": "gpt-tiny"}
    return run_batch(what if what is not None else rows(), **options | {"base_url": fake.url, "poll_s": 0.01} | changes)


def live(fake, folder, num=10, **changes):
    hashes = np.array([f"{index:064x}" for index in range(num)], object)
    stage = OpenAICaptioner(model="gpt-tiny", base_url=fake.url, answers=str(folder / "answers"), **changes)
    return stage({"frames": pictures(num), "content_hash": hashes})


def agree(done, fake, folder):
    total = fake.totals()
    assert {name: done[name] for name in total} == total
    sums = spending(str(folder / "answers"))
    assert {name: sums[name] for name in total} == total


def created(fake):
    return sum(call == ("POST", "/v1/batches") for call in fake.calls)


def test_the_live_captioner_finds_everything_afterwards(tmp_path):
    with FakeOpenAI() as fake:
        done = ask(fake, tmp_path, max_requests=4)
        assert done["num_rows"] == 10
        assert done["num_pending"] == done["num_open"] == 0
        assert done["num_answers"] == 10
        agree(done, fake, tmp_path)
        batched = live(fake, tmp_path)
        assert fake.times == []  # not one live request
    sizes = [len(fake.files[batch["input_file_id"]].splitlines()) for batch in fake.batches.values()]
    assert sizes == [4, 4, 2]
    lines = [
        json.loads(line) for batch in fake.batches.values() for line in fake.files[batch["input_file_id"]].splitlines()
    ]
    said = {line["custom_id"]: short_answer(line["body"]) for line in lines}
    assert len(said) == 10
    for index, caption in enumerate(batched["caption"]):  # results came back in another order
        assert [text for name, text in said.items() if name.startswith(f"pano%7C{index}|basic|")] == [caption]
    # And what a live captioner would have sent is what was in the lines.
    with FakeOpenAI() as fake:
        live(fake, tmp_path / "other", concurrency=1)
    assert {json.dumps(body) for body in fake.bodies} == {json.dumps(line["body"]) for line in lines}


def test_two_steps_are_two_rounds_and_too_long_ones_a_third(tmp_path):
    def say(body):
        text, images = words_of(body)
        if images:
            return f"a long look at {images} frames, " * 20
        return "short clause, " * 40 if "long look" in text else "gray road"

    with FakeOpenAI(say=say) as fake:
        done = ask(fake, tmp_path, prompt="two-step")
        assert done["num_rounds"] == 3
        assert done["num_requests"] == 30
        agree(done, fake, tmp_path)
        result = live(fake, tmp_path, prompt="two-step")
        assert fake.times == []
    assert set(result["caption"]) == {"gray road"}
    assert result["caption_prompt_tokens"].sum() == fake.totals()["prompt_tokens"]
    images = [words_of(json.loads(line)["body"])[1] for batch in fake.batches.values()
              for line in fake.files[batch["input_file_id"]].splitlines()]  # fmt: skip
    assert images == [8] * 10 + [0] * 20
    assert list((tmp_path / "batch").rglob("requests-*.jsonl")) == []  # pictures do not stay on the disk


def test_failed_expired_and_useless_lines_go_into_the_next_round(tmp_path):
    def fault(name, seen):
        kinds = {"pano%7C1|": "expired", "pano%7C2|": "500", "pano%7C3|": "empty"}
        found = next((kind for start, kind in kinds.items() if name.startswith(start)), None)
        return found if seen == 1 else None

    with FakeOpenAI(batch_fault=fault) as fake:
        done = ask(fake, tmp_path, max_requests=3)
        agree(done, fake, tmp_path)
    assert done["num_answers"] == 10
    assert done["num_requests"] == 11  # the empty one was paid
    assert done["num_troubles"] == 1
    assert done["num_pending"] == 0
    assert sorted(fake.line_seen.values()) == [1] * 7 + [2] * 3


def test_what_never_works_ends(tmp_path):
    def fault(name, seen):
        return {"0": "400", "1": "500", "2": "empty"}.get(name.split("|")[0].removeprefix("pano%7C"))

    with FakeOpenAI(batch_fault=fault) as fake:
        done = ask(fake, tmp_path, max_rounds=5)
        agree(done, fake, tmp_path)
        seen = {name.split("|")[0][-1]: count for name, count in fake.line_seen.items()}
        assert (seen["0"], seen["1"], seen["2"]) == (1, 5, MAX_PAID)
        assert done["num_pending"] == 3
        fake.batch_fault = None
        done = ask(fake, tmp_path)  # the next call tries again, but not what was paid for often enough
        assert done["num_pending"] == 1
        agree(done, fake, tmp_path)


def test_asked_again_nothing_happens_and_new_rows_are_added(tmp_path):
    with FakeOpenAI() as fake:
        ask(fake, tmp_path)
        calls = len(fake.calls)
        ask(fake, tmp_path)
        assert len(fake.calls) == calls
        done = ask(fake, tmp_path, rows(12))
        assert done["num_answers"] == 12
        assert len(fake.paid) == 12


def test_shards_keep_both_limits(tmp_path):
    def requests(sizes):
        for index, size in enumerate(sizes):
            yield {"custom_id": str(index), "pano_id": "p"}, b"x" * (size - 1) + b"\n"

    made = write_round(
        tmp_path / "round-000", requests([40, 40, 40, 100, 1, 1, 1, 1, 1]), max_requests=4, max_bytes=100
    )
    sizes = [(tmp_path / "round-000" / shard).stat().st_size for shard in made.shards]
    assert sizes == [80, 40, 100, 4, 1]
    assert [entry["custom_id"] for entry, _ in made.lines()] == [str(index) for index in range(9)]
    with pytest.raises(ValueError, match="101 bytes"):
        write_round(tmp_path / "round-001", requests([101]), max_requests=4, max_bytes=100)
    assert write_round(tmp_path / "round-002", requests([]), max_requests=4, max_bytes=100) is None


def test_rows_stream_and_never_pile_up(tmp_path):
    class Picture(bytes):
        alive = most = 0

        def __init__(self, *arguments):
            Picture.alive += 1
            Picture.most = max(Picture.most, Picture.alive)

        def __del__(self):
            Picture.alive -= 1

    def many():
        for index in range(40):
            yield f"p{index}", f"{index:064x}", Shown(8, [Picture(b"\xff\xd8jpeg%d" % index) for _ in range(8)])

    with FakeOpenAI() as fake:
        done = ask(fake, tmp_path, many(), max_requests=10)
    assert done["num_answers"] == 40
    assert Picture.most <= 3 * 8


def test_twins_are_asked_once_and_one_name_for_two_images_is_an_error(tmp_path):
    with FakeOpenAI() as fake:
        frames = pictures(1)[0]
        done = ask(fake, tmp_path, [("a", "0" * 64, frames), ("b", "0" * 64, frames)])
        assert len(fake.paid) == 1
        assert done["num_pending"] == 0
        with pytest.raises(ValueError, match="'a'"):
            ask(fake, tmp_path, [("a", "1" * 64, frames), ("a", "2" * 64, frames)])


def test_a_batch_whose_answer_was_lost_is_found_and_not_created_again(tmp_path):
    with FakeOpenAI() as fake:
        fake.create_fault = "lost"
        done = ask(fake, tmp_path, max_requests=5)
        assert created(fake) == 2
        assert len(fake.batches) == 2
        agree(done, fake, tmp_path)


def test_a_full_endpoint_is_waited_for_and_a_refused_job_says_why(tmp_path):
    with FakeOpenAI() as fake:
        fake.create_fault = "token_limit_exceeded"
        done = ask(fake, tmp_path, max_requests=5)
        assert done["num_answers"] == 10
        assert len(fake.batches) == 3
        agree(done, fake, tmp_path)
        fake.create_fault = "invalid_model"
        with pytest.raises(ValueError, match="invalid_model"):
            ask(fake, tmp_path, rows(12))
        fake.create_fault = None
        assert ask(fake, tmp_path, rows(12))["num_answers"] == 12
        assert len(fake.paid) == 12


def test_a_batch_that_never_fits_stops_the_job_and_smaller_ones_go_on(tmp_path):
    class Small(FakeOpenAI):
        def create(self, handler, body):
            large = len(self.files[body["input_file_id"]].splitlines()) > 4
            self.create_fault = "token_limit_exceeded" if large else None
            super().create(handler, body)

    with Small() as fake:
        with pytest.raises(
            ValueError, match=r"batch of 10 requests.*captions.batch_requests below 10.*batch_megabytes"
        ):
            ask(fake, tmp_path)
        assert fake.paid == []
        done = ask(fake, tmp_path, max_requests=4)
        assert (done["num_answers"], done["num_pending"]) == (10, 0)
        agree(done, fake, tmp_path)


def test_every_wait_is_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with FakeOpenAI() as fake:
        ask(fake, tmp_path, max_requests=5)
    waits = [record.message for record in caplog.records if "next look in 0.01 s" in record.message]
    assert waits
    assert "0 of 2 are done" in waits[0]


def test_what_was_left_of_another_prompt_is_collected_and_not_handed_in(tmp_path, caplog):
    with FakeOpenAI() as fake:
        fake.batch_ends = "never"
        ask(fake, tmp_path, max_requests=2, max_open=2, wait_s=0.1)
        assert len(fake.batches) == 2  # of five
        fake.batch_ends = "completed"
        done = ask(fake, tmp_path, prompt="verbose")
        assert len(fake.batches) == 3
        assert (done["num_pending"], done["num_open"]) == (0, 0)
        assert done["num_requests"] == 10  # of this prompt alone
        assert "3 of its 5 batches were not handed in" in caplog.text
        ask(fake, tmp_path, prompt="verbose")  # the first two have ended by now
        fake.fault = lambda number, body: "500"
        known = live(fake, tmp_path, ask=False)["failure"]
        assert [failure is None for failure in known] == [True] * 4 + [False] * 6
        assert len(fake.paid) == 14
        done = ask(fake, tmp_path)  # and back to the first prompt: only the rest is asked
        assert len(fake.paid) == 20
        assert done["num_requests"] == 10


def test_the_live_captioner_asks_nobody_after_a_batch(tmp_path):
    with FakeOpenAI(batch_fault=lambda name, seen: "400" if name.startswith("pano%7C3|") else None) as fake:
        ask(fake, tmp_path)
        rows = live(fake, tmp_path, ask=False)
        assert fake.times == []
        assert [failure is None for failure in rows["failure"]] == [index != 3 for index in range(10)]
        assert "no kept answer" in rows["failure"][3]
        assert "captions.source=openai" in rows["failure"][3]
        assert rows["caption_prompt_tokens"].sum() == fake.totals()["prompt_tokens"]


@pytest.mark.parametrize("how", [{"images": "sheet"}, {"max_frames": 3}])
def test_ready_files_are_the_very_request_of_the_frames(tmp_path, how):
    options = {"max_frames": 8, "images": "frames", **how}
    with FakeOpenAI() as fake:
        files = ((name, digest, show(frames, **options)) for name, digest, frames in rows(2))
        done = ask(fake, tmp_path, files, **how)
        assert done["num_pending"] == 0
        assert live(fake, tmp_path, 2, ask=False, **how)["failure"].tolist() == [None, None]
        sent = [json.loads(line)["body"] for line in fake.files["file-0"].splitlines()]
    with FakeOpenAI() as fake:
        live(fake, tmp_path / "other", 2, **how)
    assert sorted(map(json.dumps, fake.bodies)) == sorted(map(json.dumps, sent))


def test_no_more_batches_are_open_than_allowed(tmp_path):
    with FakeOpenAI() as fake:
        fake.batch_ends = "never"
        done = ask(fake, tmp_path, max_requests=1, max_open=3, wait_s=0.1)
        assert len(fake.batches) == 3
        assert done["num_open"] == 10
        assert done["num_pending"] == 10
        fake.batch_ends = "completed"
        done = ask(fake, tmp_path, max_requests=1, max_open=3)
        assert len(fake.batches) == 10
        agree(done, fake, tmp_path)


def test_a_wrong_key_stops_the_job_and_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not" + KEY)
    with FakeOpenAI(key=KEY) as fake:
        with pytest.raises(EndpointRefused, match="OPENAI_API_KEY") as caught:
            ask(fake, tmp_path)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert ask(fake, tmp_path)["num_answers"] == 10
    shown = str(caught.value) + "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "canary" not in shown


def test_results_that_are_collected_twice_count_once(tmp_path):
    with FakeOpenAI(batch_fault=lambda name, seen: "empty" if "C1|" in name and seen == 1 else None) as fake:
        ask(fake, tmp_path, max_rounds=1)
        noted = tmp_path / "batch" / "round-000" / "batches.json"
        state = json.loads(noted.read_text())
        del state["requests-00000.jsonl"]["collected"]  # as after a crash between the answers and this note
        noted.write_text(json.dumps(state))
        done = ask(fake, tmp_path)
        assert done["num_answers"] == 10
        agree(done, fake, tmp_path)


WORKER = """
import sys
import numpy as np
from hedwig.captions import dialogue
from hedwig.captions.batch import run_batch
from hedwig.captions.prompts import Fitted

# Counting tokens would import torch, for half a minute on a busy machine.
dialogue.fit = lambda text, budget, tokenizer: Fitted(text, len(text.split()), trimmed=False)
url, folder = sys.argv[1:]
frames = np.random.default_rng(0).integers(0, 255, (30, 8, 16, 16, 3), np.uint8)
rows = ((f"p{index}", f"{index:064x}", one) for index, one in enumerate(frames))
done = run_batch(rows, folder=folder + "/batch", answers=folder + "/answers", model="m", base_url=url,
                 prompt="two-step", poll_s=0.05, max_requests=7)
assert done["num_pending"] == 0, done
"""


@pytest.mark.parametrize("after", ["first upload", "second batch", "half the answers"])
def test_killed_and_started_again(tmp_path, after):
    reached = {
        "first upload": lambda fake, store: len(fake.files) >= 1,
        "second batch": lambda fake, store: len(fake.batches) >= 2,
        "half the answers": lambda fake, store: store.total()["num_answers"] >= 30,
    }[after]
    store = AnswerStore(str(tmp_path / "answers"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with FakeOpenAI() as fake:
        command = [sys.executable, "-c", textwrap.dedent(WORKER), fake.url, str(tmp_path)]
        job = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 60
        while not reached(fake, store) and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert subprocess.run(command, env=environment, timeout=100).returncode == 0
        assert len(fake.paid) == 60
        assert len({entry["key"] for entry in fake.paid}) == 60
        sums = store.total()
        assert {name: sums[name] for name in fake.totals()} == fake.totals()
        assert len(fake.batches) == 2 * 5
