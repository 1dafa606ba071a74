"""The caption stage: who is asked, what is kept, what it cost, and what a second run does."""

import numpy as np
import pyarrow as pa
import pytest
from fake_openai import FakeOpenAI
from PIL import Image

from hedwig import storage
from hedwig.captions import KeptCaptioner
from hedwig.captions.result import Answer
from hedwig.config import validate_experiment
from hedwig.pipelines.caption import captions
from hedwig.pipelines.run import Run
from hedwig.pipelines.vllm import Unanswered, _answer, _joined, _said
from hedwig.schema import PANORAMAS, captions_schema

NUM = 6


@pytest.fixture
def panoramas(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(NUM):
        pixels = rng.integers(0, 255, (8, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((256, 128)).save(tmp_path / f"{i}.jpg")
        rows.append(
            {"pano_id": f"p{i}", "projection": "equirectangular", "split": "train", "lat": float(i), "lon": 0.0,
             "image_uri": str(tmp_path / f"{i}.jpg")}
        )  # fmt: skip
    folder = str(tmp_path / "run" / "panoramas")
    storage.write_table(storage.join(folder, "part-0.parquet"), pa.Table.from_pylist(rows, schema=PANORAMAS))
    storage.publish(folder, kind="panoramas", config={}, inputs={}, num_in=NUM, num_out=NUM)
    return tmp_path / "run"


def run_of(folder, **section):
    settings = {
        "output": str(folder),
        "encoder": {"name": "viclip-tiny"},
        "slicing": {"num_frames": 2},
        "data": {"max_rejected": 0.5},
        "captions": {"frame_px": 64, "max_frames": 2, **section},
    }
    return Run(validate_experiment(settings))


def test_captions_of_an_endpoint_are_exact_in_text_and_account(panoramas, ray_session):
    def fault(number, body):
        return "400" if fails and number % NUM == 3 else None

    fails = True
    with FakeOpenAI(fault=fault) as endpoint:
        section = {
            "source": "openai", "model": "m", "base_url": endpoint.url, "usd_per_million_input": 1.0,
            "usd_per_million_output": 2.0,
        }  # fmt: skip
        first = captions(run_of(panoramas, **section))
        assert (first.num_in, first.num_out, first.num_rejected) == (NUM, NUM - 1, 1)
        again = captions(run_of(panoramas, **section, concurrency=3))  # how fast it is asked changes no caption
        assert again.num_rejected in (0, 1)
        fails = False
        second = captions(run_of(panoramas, **section))
        assert (second.num_out, second.num_rejected) == (NUM, 0)
        calls = len(endpoint.times)
        assert captions(run_of(panoramas, **section)) == second
        assert len(endpoint.times) == calls  # up to date: nothing is asked
        assert len(endpoint.paid) == NUM
        spending = second.details["spending"]
        read, written = (sum(p[name] for p in endpoint.paid) for name in ("prompt_tokens", "completion_tokens"))
        assert (spending["prompt_tokens"], spending["completion_tokens"]) == (read, written)
        assert spending["cost_usd"] == pytest.approx((read + 2 * written) / 1e6)
    table = storage.read_table(str(panoramas / "captions"))
    assert set(table.column_names) == set(captions_schema(asked=True).names)
    assert len(set(table["caption"].to_pylist())) > 1
    assert all(text.startswith("gray road") for text in table["caption"].to_pylist())


def test_a_row_that_keeps_failing_does_not_make_later_stages_stale(panoramas, ray_session):
    with FakeOpenAI(fault=lambda number, body: "400" if number % NUM == 3 else None) as endpoint:
        section = {"source": "openai", "model": "m", "base_url": endpoint.url, "concurrency": 1}
        captions(run_of(panoramas, **section))
        digest = storage.manifest_digest(str(panoramas / "captions"))
        endpoint.fault = lambda number, body: "400"
        captions(run_of(panoramas, **section))
        assert storage.manifest_digest(str(panoramas / "captions")) == digest


def test_the_batch_api_answers_first_and_the_row_flow_asks_nothing(panoramas, ray_session):
    with FakeOpenAI() as endpoint:
        endpoint.fault = lambda number, body: "500"  # no live request may succeed
        manifest = captions(run_of(panoramas, source="openai-batch", model="m", base_url=endpoint.url, poll_s=0.1))
        assert (manifest.num_out, manifest.num_rejected) == (NUM, 0)
        assert len(endpoint.batches) == 1
        assert manifest.details["spending"]["num_requests"] == NUM


def test_no_captions_read_no_image(panoramas, ray_session):
    for i in range(NUM):
        (panoramas.parent / f"{i}.jpg").unlink()
    manifest = captions(run_of(panoramas, source="none"))
    assert manifest.num_out == NUM
    assert set(storage.read_table(str(panoramas / "captions"))["caption"].to_pylist()) == {""}


def kept(tmp_path):
    return {
        "answers": str(tmp_path / "answers"), "model": "m", "revision": None, "prompt": "basic", "token_budget": 30,
        "tokenizer": "viclip", "max_frames": 8, "leaks": "report", "slicing_digest": "s",
    }  # fmt: skip


def test_kept_answers_become_captions_and_missing_ones_failures(tmp_path):
    captioner = KeptCaptioner(**kept(tmp_path))
    captioner.keep("a", Answer(text="gray road", prompt_tokens=5, completion_tokens=2))
    captioner.keep("b", Answer(failure="out of memory", prompt_tokens=5))
    out = captioner({"content_hash": np.array(["a", "b", "c"], dtype=object)})
    assert out["caption"][0] == "gray road"
    assert out["failure"][0] is None
    assert "out of memory" in out["failure"][1]
    assert "was not asked" in out["failure"][2]
    assert captioner.store.total()["prompt_tokens"] == 10
    other = KeptCaptioner(**{**kept(tmp_path), "prompt": "verbose"})
    assert other({"content_hash": np.array(["a"], dtype=object)})["failure"][0] is not None


def test_vllm_is_asked_once_per_image_without_an_answer(tmp_path, panoramas):
    from hedwig.pipelines.caption import _cut, frames_to_show

    table = storage.read_table(str(panoramas / "panoramas"))
    table = pa.concat_tables([table, table.slice(0, 1)])
    run = run_of(panoramas)
    unanswered = Unanswered(_cut(run, frames_to_show(run)), kept(tmp_path))
    asked = unanswered(table)
    assert asked.num_rows == NUM
    assert {len(f) for f in asked["frames_flat"].to_pylist()} == {2 * 64 * 64 * 3}
    KeptCaptioner(**kept(tmp_path)).keep(asked["content_hash"][0].as_py(), Answer(text="gray road"))
    assert unanswered(table).num_rows == NUM - 1


def test_two_steps_are_joined_with_the_tokens_of_both():
    first = _said({"generated_text": "long", "num_input_tokens": 7, "num_generated_tokens": 3})
    second = _said({"generated_text": "short", "num_input_tokens": 2, "num_generated_tokens": 1})
    answer = _answer(_joined(first, second))
    assert (answer.text, answer.detail, answer.prompt_tokens, answer.completion_tokens) == ("short", "long", 9, 4)
    assert answer.failure is None
    broken = _answer(_said({"__inference_error__": "boom"}))
    assert broken.failure == "the model failed: boom"
