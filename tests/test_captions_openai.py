"""The OpenAI-compatible captioner against an endpoint that fails in every way: nothing lost, nothing paid twice."""

from __future__ import annotations

import base64
import collections
import io
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fake_openai import FakeOpenAI, short_answer, words_of
from PIL import Image
from tests_serving import free_port

from hedwig.answers import AnswersRefused, AnswerStore
from hedwig.captions.dialogue import read_completion
from hedwig.captions.openai import MAX_PAID, EndpointRefused, OpenAICaptioner
from hedwig.captions.spending import spending
from hedwig.pipelines.chain import Chain, Step

KEY = "sk-canary-4f1d/+%"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("hedwig.web.random.uniform", lambda low, high: 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def batch(num=6, views=8, side=32, seed=0, first=0):
    pictures = np.random.default_rng(seed).integers(0, 255, (num, views, side, side, 3), np.uint8)
    hashes = np.array([f"{index + first:064x}" for index in range(num)], object)
    return {"frames": pictures, "content_hash": hashes}


def captioner(fake, folder, **changes):
    return OpenAICaptioner(
        **{"model": "gpt-tiny", "base_url": fake.url, "answers": str(folder), "timeout_s": 5.0} | changes
    )


def ledger(folder):
    sums = spending(str(folder))
    return {name: sums[name] for name in ("num_requests", "prompt_tokens", "completion_tokens")}


def test_what_is_asked_and_what_comes_back(tmp_path):
    with FakeOpenAI() as fake:
        rows = captioner(fake, tmp_path, max_frames=4, detail="high", revision="r1")(batch(3))
    assert list(rows["failure"]) == [None] * 3
    assert list(rows["caption"]) == [short_answer(body) for body in sorted_bodies(fake, rows)]
    assert set(rows["caption_model"]) == {"openai:gpt-tiny@r1"}
    assert rows["caption_prompt_tokens"].sum() == fake.totals()["prompt_tokens"]
    assert rows["caption_completion_tokens"].sum() == fake.totals()["completion_tokens"]
    body = fake.bodies[0]
    assert body["temperature"] == 0
    assert body["max_tokens"] > 30
    parts = body["messages"][0]["content"]
    assert [part.get("text") for part in parts[::2][:4]] == ["Frame1:", "Frame2:", "Frame3:", "Frame4:"]
    assert {part["image_url"]["detail"] for part in parts if part["type"] == "image_url"} == {"high"}
    assert fake.sent_keys[0] in {path.stem for path in tmp_path.rglob("*.json")}


def sorted_bodies(fake, rows):
    """Bodies in the order of the rows: answers differ, so each caption names its request."""
    by_answer = {short_answer(body): body for body in fake.bodies}
    return [by_answer[caption] for caption in rows["caption"]]


def test_a_sheet_is_one_image(tmp_path):
    with FakeOpenAI() as fake:
        captioner(fake, tmp_path, images="sheet")(batch(1))
    assert words_of(fake.bodies[0])[1] == 1
    assert "Frame1" not in words_of(fake.bodies[0])[0]


def test_nothing_is_asked_twice_and_other_settings_are_other_questions(tmp_path):
    with FakeOpenAI() as fake:
        first = captioner(fake, tmp_path)(batch())
        again = captioner(fake, tmp_path)(batch())
        assert len(fake.paid) == 6
        assert list(first["caption"]) == list(again["caption"])
        assert list(first["caption_prompt_tokens"]) == list(again["caption_prompt_tokens"])
        for number, change in enumerate(
            ({"model": "other"}, {"revision": "2"}, {"detail": "high"}, {"max_frames": 4}, {"images": "sheet"},
             {"slicing_digest": "x"}, {"prompt": "verbose"})
        ):  # fmt: skip
            captioner(fake, tmp_path, **change)(batch())
            assert len(fake.paid) == 6 * (number + 2), change
        assert ledger(tmp_path) == fake.totals()


def test_twins_in_a_batch_are_asked_about_once(tmp_path):
    rows = batch(8)
    rows["content_hash"][:] = rows["content_hash"][0]
    rows["frames"][:] = rows["frames"][0]
    with FakeOpenAI(delay_s=0.05) as fake:
        result = captioner(fake, tmp_path)(rows)
    assert len(fake.paid) == 1
    assert len(set(result["caption"])) == 1
    assert list(result["failure"]) == [None] * 8


def test_every_fault_is_survived_and_the_books_agree(tmp_path):
    faults = ["429:0.1", "500", "malformed", "drop", "hang", "empty", "refused", "no-choices"]
    with FakeOpenAI(fault=lambda number, body: faults[number] if number < len(faults) else None) as fake:
        rows = captioner(fake, tmp_path, timeout_s=0.5)(batch(10))
        assert list(rows["failure"]) == [None] * 10
        assert ledger(tmp_path) == fake.totals()
        assert len(fake.paid) == 10 + 3  # the three that were paid and of no use
        assert len(fake.times) == 10 + len(faults)
        assert spending(str(tmp_path))["num_troubles"] == 3
        assert spending(str(tmp_path))["num_answers"] == 10
        # A paid answer of no use must not be repeated by the service: the next attempt has another idempotency key.
        assert all(count == 1 for count in collections.Counter(entry["key"] for entry in fake.paid).values())


def test_useless_answers_are_paid_a_few_times_and_then_never_again(tmp_path):
    with FakeOpenAI(fault=lambda number, body: "refused") as fake:
        for _ in range(3):
            rows = captioner(fake, tmp_path)(batch(2))
        assert len(fake.paid) == 2 * MAX_PAID
        assert ledger(tmp_path) == fake.totals()
    assert "content filter" in rows["failure"][0]
    path = Path(rows["failure"][0].split("delete ")[1].removesuffix(" to ask again"))
    path.unlink()
    with FakeOpenAI() as fake:
        assert (captioner(fake, tmp_path)(batch(2))["failure"] == None).sum() == 1  # noqa: E711


def test_a_refused_request_fails_its_row_alone_and_gets_another_chance(tmp_path):
    doomed = "Frame5:"

    def fault(number, body):
        return "400" if doomed in words_of(body)[0] and number == 2 else None

    with FakeOpenAI(fault=fault) as fake:
        rows = captioner(fake, tmp_path, concurrency=1)(batch(5))
        assert [failure is None for failure in rows["failure"]] == [True, True, False, True, True]
        assert "HTTP 400" in rows["failure"][2]
        assert "captions.images" in rows["failure"][2]
        rows = captioner(fake, tmp_path)(batch(5))
        assert list(rows["failure"]) == [None] * 5
        assert len(fake.paid) == 5


def test_given_up_rows_say_so_and_the_next_run_finishes_them(tmp_path):
    with FakeOpenAI(fault=lambda number, body: "500") as fake:
        rows = captioner(fake, tmp_path, max_attempts=2)(batch(2))
        assert len(fake.times) == 4
        assert "given up after 2 attempts" in rows["failure"][0]
        assert "same command again" in rows["failure"][0]
        fake.fault = None
        assert list(captioner(fake, tmp_path)(batch(2))["failure"]) == [None] * 2
        assert len(fake.paid) == 2


@pytest.mark.parametrize(
    ("fault", "says"), [("401", "OPENAI_API_KEY"), ("404", "captions.base_url"), ("429-quota", "credit")]
)
def test_an_endpoint_that_answers_nobody_stops_the_job(tmp_path, fault, says):
    with FakeOpenAI(fault=lambda number, body: fault if number >= 2 else None) as fake:
        stage = captioner(fake, tmp_path, concurrency=1)
        with pytest.raises(EndpointRefused, match=says) as caught:
            stage(batch(20))
        asked = len(fake.times)
        assert asked == 3  # two answers, one refusal, and nobody asked after it
        with pytest.raises(PermissionError):
            stage(batch(1, first=50))
        assert len(fake.times) == asked
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        fake.fault = None
        assert list(captioner(fake, tmp_path)(batch(20))["failure"]) == [None] * 20
        assert len(fake.paid) == 20


def test_concurrency_is_reached_and_never_exceeded(tmp_path):
    with FakeOpenAI(delay_s=0.05) as fake:
        started = time.monotonic()
        captioner(fake, tmp_path, concurrency=5)(batch(30, side=8))
        seconds = time.monotonic() - started
    assert fake.most_under_way == 5
    assert seconds < 30 * 0.05 * 0.8  # in parallel


def test_rate_holds_across_batches(tmp_path):
    with FakeOpenAI() as fake:
        stage = captioner(fake, tmp_path, per_second=20.0)
        stage(batch(6))
        stage(batch(6, first=6))
    gaps = np.diff(np.sort(fake.times))
    assert len(gaps) == 11
    assert fake.times[-1] - fake.times[0] >= 11 / 20 - 0.02


def test_retry_after_is_obeyed_by_all(tmp_path):
    with FakeOpenAI(fault=lambda number, body: "429:0.6" if number == 0 else None) as fake:
        captioner(fake, tmp_path, concurrency=1)(batch(2))
    assert fake.times[1] - fake.times[0] >= 0.6
    assert fake.times[1] - fake.times[0] < 1.5


def test_the_second_step_reads_the_first_and_does_not_wait_for_other_rows(tmp_path):
    def say(body):
        images = words_of(body)[1]
        return f"a long look at {images} frames of a street, " * 8 if images else "gray road, red roofs"

    def fault(number, body):
        return "hang" if number == 0 else None  # one row's first step hangs until its timeout

    with FakeOpenAI(say=say, fault=fault) as fake:
        rows = captioner(fake, tmp_path, prompt="two-step", timeout_s=1.0)(batch(4))
        kinds = [words_of(body)[1] > 0 for body in fake.bodies]
        assert sum(kinds) == 5
        assert len(kinds) - sum(kinds) == 4
        last_first_step = max(index for index, kind in enumerate(kinds) if kind)
        assert kinds.index(False) < last_first_step  # condensed before the hanging row had even been described
        assert ledger(tmp_path) == fake.totals()
    assert list(rows["caption"]) == ["gray road, red roofs"] * 4
    assert all("a long look at 8 frames" in detail for detail in rows["caption_detail"])
    assert rows["caption_prompt_tokens"].sum() == fake.totals()["prompt_tokens"]


def test_too_long_a_caption_is_asked_about_once_more_and_then_cut(tmp_path):
    lengths = []

    def say(body):
        images = words_of(body)[1]
        lengths.append(images)
        return "a grey road with white lines and wooden poles, red tile roofs behind low stone walls, " * 3

    with FakeOpenAI(say=say) as fake:
        rows = captioner(fake, tmp_path)(batch(1))
    assert lengths == [8, 0]
    assert 10 < rows["caption_num_tokens"][0] <= 30
    assert rows["caption"][0].endswith(("poles", "walls"))
    assert ledger(tmp_path) == fake.totals()


def test_without_a_budget_nothing_is_shortened(tmp_path):
    text = "a grey road with white lines and wooden poles, red tile roofs behind low stone walls, " * 3
    with FakeOpenAI(say=lambda body: text) as fake:
        rows = captioner(fake, tmp_path, token_budget=None, prompt="verbose")(batch(1))
    assert len(fake.paid) == 1
    assert rows["caption"][0] == text.strip()
    assert rows["caption_num_tokens"][0] > 45
    assert rows["caption_trimmed"].tolist() == [False]


def test_frames_are_the_same_as_elsewhere_and_part_of_the_question(tmp_path):
    rows = batch(1)
    rows["frames"][:] = np.arange(8, dtype=np.uint8)[None, :, None, None, None] * 30
    with FakeOpenAI() as fake:
        captioner(fake, tmp_path, max_frames=4)(rows)
    shades = []
    for part in fake.bodies[0]["messages"][0]["content"]:
        if part["type"] == "image_url":
            file = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            shades.append(int(np.asarray(Image.open(io.BytesIO(file)))[0, 0, 0]))
    assert np.abs(np.array(shades) - [0, 60, 120, 180]).max() <= 2  # 0, 2, 4, 6: evenly around the circle


def test_a_thought_that_was_cut_off_is_of_no_use(tmp_path):
    body = {"choices": [{"message": {"content": "<think>Could be"}, "finish_reason": "length"}], "usage": {"x": 1}}
    assert "thoughts" in read_completion(body).trouble
    body["choices"][0]["message"]["content"] = "<think>Could be</think>A road"
    assert read_completion(body).trouble is None
    body["choices"][0] = {"message": {"content": "<think>Could be</think>"}, "finish_reason": "stop"}
    assert "empty" in read_completion(body).trouble


def test_a_store_that_keeps_nothing_stops_the_job(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    steps = [Step(Ready, {"num": 20}), Step(OpenAICaptioner, {})]
    with FakeOpenAI() as fake:
        options = {"model": "m", "base_url": fake.url, "answers": str(tmp_path), "concurrency": 2}
        steps[1] = Step(OpenAICaptioner, options)
        chain = Chain(steps, pa.schema([("pano_id", pa.string()), ("caption", pa.string())]))
        monkeypatch.setattr("hedwig.answers.storage.write_bytes", full)
        with pytest.raises(AnswersRefused, match="No space left"):
            chain(pa.table({"pano_id": [f"p{index}" for index in range(20)]}))
        assert len(fake.paid) <= 4  # those under way, and not every row alone
        with pytest.raises(PermissionError, match="Answers cannot be kept"):
            OpenAICaptioner(**options)


class Ready:
    """Frames of nothing."""

    reads = ("pano_id",)
    writes = ("frames", "content_hash")

    def __init__(self, *, num):
        self.rows = batch(num)

    def __call__(self, table):
        size = len(table["pano_id"])
        return {**table, **{name: column[:size] for name, column in self.rows.items()}}


def test_odd_answers(tmp_path):
    def say(body):
        return "half a character \ud83d here"

    with FakeOpenAI(say=say) as fake:
        rows = captioner(fake, tmp_path)(batch(1))
    assert rows["failure"][0] is None
    rows["caption"][0].encode()


def test_the_key_is_nowhere(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    caplog.set_level(logging.DEBUG)
    with FakeOpenAI(key=KEY) as fake:
        stage = captioner(fake, tmp_path, api_key_env="MY_KEY")
        stage(batch(2))
        assert len(fake.paid) == 2
        shown = repr(stage) + str(vars(stage)) + str(vars(stage._politeness))
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(stage)
        monkeypatch.setenv("MY_KEY", "wrong" + KEY)
        with pytest.raises(PermissionError, match="MY_KEY") as caught:
            captioner(fake, tmp_path, api_key_env="MY_KEY")(batch(2, first=9))
    shown += str(caught.value) + repr(caught.value) + caplog.text
    shown += "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "Incorrect API key" in shown
    assert "canary" not in shown


def test_a_missing_key_is_named_and_loopback_needs_none(tmp_path):
    with pytest.raises(PermissionError, match="MY_OWN_KEY"):
        OpenAICaptioner(
            model="m", base_url="https://api.example.org/v1", answers=str(tmp_path), api_key_env="MY_OWN_KEY"
        )
    for host in ("127.0.0.1", "localhost", "[::1]"):
        OpenAICaptioner(model="m", base_url=f"http://{host}:9/v1", answers=str(tmp_path))


def test_bad_arguments_name_themselves(tmp_path):
    good = {"model": "m", "base_url": "http://localhost:9/v1", "answers": str(tmp_path)}
    for change, says in (
        ({"token_budget": 31}, "31"), ({"prompt": "haiku"}, "haiku"), ({"max_frames": 0}, "max_frames"),
        ({"base_url": "localhost"}, "http"), ({"base_url": "http://me:pw@localhost/v1"}, "password"),
        ({"concurrency": 0}, "concurrency"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            OpenAICaptioner(**{**good, **change})
    with pytest.raises(ValueError, match="uint8"):
        OpenAICaptioner(**good)(
            {"frames": np.zeros((1, 2, 8, 8, 3), np.float32), "content_hash": np.array(["a"], object)}
        )


WORKER = """
import sys
import numpy as np
from hedwig.captions import dialogue, result
from hedwig.captions.openai import OpenAICaptioner
from hedwig.captions.prompts import Fitted

# Counting tokens would import torch, for half a minute on a busy machine.
dialogue.fit = result.fit = lambda text, budget, tokenizer: Fitted(text, len(text.split()), trimmed=False)
url, folder = sys.argv[1:]
pictures = np.random.default_rng(0).integers(0, 255, (24, 8, 16, 16, 3), np.uint8)
hashes = np.array([f"{index:064x}" for index in range(24)], object)
stage = OpenAICaptioner(model="gpt-tiny", base_url=url, answers=folder, concurrency=4, prompt="two-step")
rows = stage({"frames": pictures, "content_hash": hashes})
assert all(failure is None for failure in rows["failure"]), rows["failure"]
"""


def work(fake, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(WORKER), fake.url, str(folder)], env=environment)


def test_killed_in_the_middle_and_started_again_pays_once(tmp_path):
    store = AnswerStore(str(tmp_path))
    with FakeOpenAI(fault=lambda number, body: "hang" if number >= 17 else None) as fake:
        job = work(fake, tmp_path)
        deadline = time.monotonic() + 60
        while store.total()["num_answers"] < 17 and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert len(fake.paid) == 17
        fake.fault = None
        assert work(fake, tmp_path).wait(60) == 0
        assert len(fake.paid) == 48
        assert ledger(tmp_path) == fake.totals()


def test_killed_at_any_moment_with_idempotency_pays_once(tmp_path):
    with FakeOpenAI(idempotent=True, delay_s=0.03) as fake:
        job = work(fake, tmp_path)
        deadline = time.monotonic() + 60
        while len(fake.paid) < 11 and time.monotonic() < deadline:
            time.sleep(0.001)
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert work(fake, tmp_path).wait(60) == 0
        assert len(fake.paid) == 48
        assert ledger(tmp_path) == fake.totals()


def test_costs_are_exact_and_unstated_without_a_price(tmp_path):
    with FakeOpenAI() as fake:
        captioner(fake, tmp_path)(batch(7))
        total = fake.totals()
    assert spending(str(tmp_path))["cost_usd"] is None
    assert spending(str(tmp_path), usd_per_million_input=0.15)["cost_usd"] is None
    cost = spending(str(tmp_path), usd_per_million_input=0.15, usd_per_million_output=0.6)["cost_usd"]
    assert cost == pytest.approx((total["prompt_tokens"] * 0.15 + total["completion_tokens"] * 0.6) / 1e6, rel=1e-12)
    assert spending(str(tmp_path / "nothing"))["num_requests"] == 0


@pytest.mark.slow
def test_a_real_server_captions(tmp_path):
    """`transformers serve` with a tiny random model: the protocol of a server that is not ours."""
    from tiny_vlm import make_tiny_internvl  # imports torch

    model = make_tiny_internvl(tmp_path / "tiny")
    port = free_port()
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    log = open(tmp_path / "log", "w")  # noqa: SIM115
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.5)
        stage = OpenAICaptioner(
            model=str(model), base_url=f"{url}/v1", answers=str(tmp_path / "answers"), prompt="two-step",
            max_frames=2, timeout_s=120.0, concurrency=2,
        )  # fmt: skip
        rows = stage(batch(3, side=56))
        assert list(rows["failure"]) == [None] * 3, rows["failure"]
        assert (rows["caption_num_tokens"] > 0).all()
        assert (rows["caption_num_tokens"] <= 30).all()
        assert all(rows["caption_detail"])
        sums = spending(str(tmp_path / "answers"))
        assert sums["num_requests"] >= 6
        assert rows["caption_prompt_tokens"].sum() == sums["prompt_tokens"] > 3 * 2 * 4
        assert rows["caption_completion_tokens"].sum() == sums["completion_tokens"] > 0
    finally:
        server.terminate()
        server.wait(30)
        log.close()
    again = stage(batch(3, side=56))  # nobody is there any more
    assert list(again["caption"]) == list(rows["caption"])
