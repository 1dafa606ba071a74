"""The caption stage: who is asked, what is kept, what it cost, and what a second run does."""

import json

import numpy as np
import pyarrow as pa
import pytest
from fake_openai import FakeOpenAI, words_of
from PIL import Image

from hedwig import storage
from hedwig.captions import KeptCaptioner
from hedwig.captions.result import Answer
from hedwig.captions.vllm import answer_of
from hedwig.config import validate_experiment
from hedwig.pipelines.caption import captions
from hedwig.pipelines.checks import check_captions, token_budget_of
from hedwig.pipelines.run import Run
from hedwig.pipelines.vllm import Talk, Unanswered
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
        # The refused row was asked once more, at number NUM + 0, which is no number of a fault.
        assert (again.num_out, again.num_rejected) == (NUM, 0)
        assert again.details["num_captions_trimmed"] == 0
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


@pytest.mark.slow
def test_a_row_that_keeps_failing_does_not_make_later_stages_stale(panoramas, ray_session, monkeypatch):
    folder = str(panoramas / "captions")
    with FakeOpenAI(fault=lambda number, body: "400" if number % NUM == 3 else None) as endpoint:
        section = {"source": "openai", "model": "m", "base_url": endpoint.url, "concurrency": 1}
        first = captions(run_of(panoramas, **section))
        assert not [name for name in first.files if name.startswith("rejected")]
        digest = storage.manifest_digest(folder)
        endpoint.fault = lambda number, body: "400"
        for _ in range(2):
            asked = len(endpoint.times)
            run = run_of(panoramas, **section)
            captions(run)
            assert len(endpoint.times) == asked + 1  # one row had another chance, and no other was asked about
            assert storage.manifest_digest(folder) == digest
            assert (run.resumed, run.made) == (["caption"], {})
        with monkeypatch.context() as patch:  # an attempt that raises, and one that is killed
            patch.setattr("hedwig.pipelines.caption.map_rows", _breaks)
            with pytest.raises(RuntimeError, match="no disk"):
                captions(run_of(panoramas, **section))
            assert storage.manifest_digest(folder) == digest
            patch.setattr("hedwig.pipelines.chances.put_back_manifest", lambda folder: None)
            with pytest.raises(RuntimeError, match="no disk"):
                captions(run_of(panoramas, **section))
            assert storage.read_manifest(folder) is None
        captions(run_of(panoramas, **section))
        assert storage.manifest_digest(folder) == digest
        endpoint.fault = None
        assert captions(run_of(panoramas, **section)).num_out == NUM
        assert storage.manifest_digest(folder) != digest
        assert len(endpoint.paid) == NUM


def _breaks(*arguments):
    raise RuntimeError("no disk")


@pytest.mark.slow
def test_the_account_is_of_these_rows_and_this_prompt_alone(panoramas, ray_session):
    say = "low houses with red roofs, " * 12
    with FakeOpenAI(say=lambda body: say) as endpoint:
        section = {"source": "openai", "model": "m", "base_url": endpoint.url}
        whole = captions(run_of(panoramas, **section))
        assert whole.details["num_captions_trimmed"] == 0  # the preset reads long captions in chunks
        assert whole.details["spending"]["num_requests"] == NUM
        cut = captions(run_of(panoramas, **section, token_budget=10, prompt="verbose"))
        assert cut.details["num_captions_trimmed"] == NUM
        assert cut.details["spending"]["num_requests"] == 2 * NUM  # described, then shortened
        assert len(endpoint.paid) == 3 * NUM
        assert cut.config["captions"]["token_budget"] == 10


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        ({"preset": "paper", "encoder": {"name": "viclip-tiny"}}, 30),
        ({"preset": "paper", "encoder": {"name": "clip-tiny"}}, 75),
        ({"preset": "paper", "encoder": {"name": "viclip-tiny"}, "captions": {"prompt": "two-step"}}, 30),
        ({"preset": "paper", "encoder": {"name": "viclip-tiny"}, "captions": {"prompt": "verbose"}}, None),
        ({"preset": "hedwig", "encoder": {"name": "viclip-tiny"}}, None),
        ({"preset": "hedwig", "encoder": {"name": "viclip-tiny"}, "captions": {"token_budget": 12}}, 12),
    ],
)
def test_captions_are_as_long_as_the_encoder_reads(settings, budget):
    assert token_budget_of(validate_experiment({"output": "runs/x", **settings}))[0] == budget


@pytest.mark.slow
def test_the_batch_api_answers_first_and_the_row_flow_asks_nothing(panoramas, ray_session):
    with FakeOpenAI() as endpoint:
        endpoint.fault = lambda number, body: "500"  # no live request may succeed
        manifest = captions(run_of(panoramas, source="openai-batch", model="m", base_url=endpoint.url, poll_s=0.1))
        assert (manifest.num_out, manifest.num_rejected) == (NUM, 0)
        assert len(endpoint.batches) == 1
        assert manifest.details["spending"]["num_requests"] == NUM
        assert endpoint.times == []
        sheets = captions(
            run_of(panoramas, source="openai-batch", model="m", base_url=endpoint.url, poll_s=0.1, images="sheet")
        )
        assert (sheets.num_out, sheets.num_rejected) == (NUM, 0)
        sent = endpoint.files[list(endpoint.batches.values())[-1]["input_file_id"]]
        assert {words_of(json.loads(line)["body"])[1] for line in sent.splitlines()} == {1}


def test_no_captions_read_no_image(panoramas, ray_session):
    for i in range(NUM):
        (panoramas.parent / f"{i}.jpg").unlink()
    manifest = captions(run_of(panoramas, source="none"))
    assert manifest.num_out == NUM
    assert set(storage.read_table(str(panoramas / "captions"))["caption"].to_pylist()) == {""}


def kept(tmp_path):
    return {
        "answers": str(tmp_path / "answers"), "model": "m", "revision": None, "prompt": "basic", "token_budget": 30,
        "tokenizer": "viclip", "max_frames": 8, "leaks": "report", "slicing_digest": "s", "route": "messages",
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
    assert captioner.store.total()["num_troubles"] == 1

    def knows(**changes):
        other = KeptCaptioner(**{**kept(tmp_path), **changes})
        return other({"content_hash": np.array(["a"], dtype=object)})["failure"][0] is None

    assert knows(token_budget=12)  # cut in another way, asked in the same
    assert knows(token_budget=75, tokenizer="clip")
    assert not any(knows(**change) for change in ({"prompt": "verbose"}, {"route": "prompt"}, {"revision": "2"}))


def test_vllm_is_asked_once_per_image_without_an_answer(tmp_path, panoramas):
    from hedwig.pipelines.caption import frames_to_show
    from hedwig.pipelines.encode import cutting_steps

    table = storage.read_table(str(panoramas / "panoramas"))
    table = pa.concat_tables([table, table.slice(0, 1)])
    run = run_of(panoramas)
    unanswered = Unanswered(cutting_steps(run, frames_to_show(run)), kept(tmp_path))
    asked = unanswered(table)
    assert asked.num_rows == NUM
    assert {len(f) for f in asked["frames_flat"].to_pylist()} == {2 * 64 * 64 * 3}
    KeptCaptioner(**kept(tmp_path)).keep(asked["content_hash"][0].as_py(), Answer(text="gray road"))
    assert unanswered(table).num_rows == NUM - 1


def talk(**changes):
    settings = {
        "route": "messages", "prompt": "two-step", "max_frames": 2, "shape": (2, 64, 64, 3), "token_budget": 30,
        "tokenizer": "viclip",
    }  # fmt: skip
    return Talk(**{**settings, **changes})


def test_rows_go_through_rays_own_wrappers(ray_wrappers):
    before, after = ray_wrappers
    row = {"content_hash": "a", "frames_flat": np.zeros((2, 64, 64, 3), np.uint8).tobytes()}
    asked = before(talk().first, "__data")(row)["__data"]
    asked |= {"generated_text": "a long look", "num_input_tokens": 7, "num_generated_tokens": 3,
              "__inference_error__": ""}  # fmt: skip
    said = after(talk().said, "__data", include_error_column=True)({"__data": asked})
    assert said["text"] == "a long look"
    asked = before(talk().second, "__data")(said)["__data"]
    json.dumps(asked)  # a row that held itself would have no end
    assert "a long look" in asked["messages"][0]["content"]
    asked |= {"generated_text": "short", "num_input_tokens": 2, "num_generated_tokens": 1, "__inference_error__": ""}
    answer = answer_of(after(talk().said_again, "__data", include_error_column=True)({"__data": asked}))
    assert (answer.text, answer.detail, answer.prompt_tokens, answer.completion_tokens) == (
        "short",
        "a long look",
        9,
        4,
    )
    # A row that failed in the first step comes by the second without what `said` would have written.
    failed = after(talk().said, "__data")({"__data": {"content_hash": "b", "__inference_error__": "ValueError: long"}})
    failed = before(talk().second, "__data")(failed)["__data"]
    answer = answer_of(after(talk().said_again, "__data")({"__data": failed}))
    assert answer.failure == "the model failed: ValueError: long"


@pytest.fixture
def ray_wrappers():
    stages = pytest.importorskip("ray.llm._internal.batch.stages.base", reason="this Ray has no llm parts")
    return stages.wrap_preprocess, stages.wrap_postprocess


class StubEngine:
    """In place of Ray's processor for vLLM: the same wrappers, and an engine that fails on one image in its step."""

    def __init__(self, wrappers, dark_step):
        self.before, self.after = wrappers
        self.dark_step, self.steps, self.settings = dark_step, 0, []

    def __call__(self, settings, preprocess, postprocess):
        self.settings.append(settings)
        step, dark = self.steps, self.dark_step
        self.steps += 1

        def engine(row):
            data = dict(row["__data"])
            if not data.get("__inference_error__"):
                fails = step == dark and data["content_hash"][0] in "01234567"
                data |= {
                    "generated_text": None if fails else f"{'gray road' if step else 'a long look'}",
                    "num_input_tokens": 0 if fails else 5,
                    "num_generated_tokens": 0 if fails else 2,
                    "__inference_error__": "ValueError: too long" if fails else "",
                }
            return {"__data": data}

        before, after = self.before(preprocess, "__data"), self.after(postprocess, "__data", include_error_column=True)
        return lambda rows: rows.map(before).map(engine).map(after)


def model_of(folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dark_step", [0, 1])
def test_vllm_fills_the_store_and_errors_are_failures(panoramas, ray_session, ray_wrappers, dark_step, monkeypatch):
    model = model_of(panoramas / "tiny")
    run = run_of(panoramas, source="vllm", model=str(model), prompt="two-step")
    engine = StubEngine(ray_wrappers, dark_step)
    monkeypatch.setattr("hedwig.pipelines.vllm._vllm_processor", lambda: engine)
    run.experiment = run.experiment.model_copy(
        update={"data": run.experiment.data.model_copy(update={"max_rejected": NUM})}
    )
    manifest = captions(run)
    table = storage.read_table(str(panoramas / "captions"))
    assert {row["content_hash"][0] in "01234567" for row in table.to_pylist()} <= {False}
    rejected = storage.read_table(str(panoramas / "captions" / "rejected"))["reason"].to_pylist()
    assert manifest.num_rejected == len(rejected) > 0
    assert manifest.num_out > 0
    assert all("the model failed: ValueError: too long" in reason for reason in rejected)
    assert set(table["caption"].to_pylist()) == {"gray road"}
    assert set(table["caption_detail"].to_pylist()) == {"a long look"}
    spent = manifest.details["spending"]
    assert spent["prompt_tokens"] == 10 * manifest.num_out + (5 * len(rejected) if dark_step else 0)
    assert spent["num_troubles"] == len(rejected)
    assert engine.settings[0]["model_source"] == str(model)
    before = manifest.inputs["model"]
    (model / "model.safetensors").write_bytes(b"other weights")
    engine.dark_step = None
    again = captions(run)
    assert again.inputs["model"] != before
    assert again.num_out == NUM  # other weights were asked anew


def test_settings_that_cannot_work_are_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    api = {"source": "openai", "model": "m", "base_url": "https://api.example.org/v1"}
    model = str(model_of(tmp_path / "model"))
    cases = [
        (PermissionError, "OPENAI_API_KEY", api, {}),
        (ValueError, "local", {**api, "source": "openai-batch"}, {"output": "s3://bucket/run"}),
        (ValueError, "chunks", {**api, "token_budget": 75}, {}),
        (FileNotFoundError, "no model", {"source": "transformers", "model": str(tmp_path / "no")}, {}),
        (FileNotFoundError, "no model", {"source": "vllm", "model": "owner/name"}, {}),
        (FileNotFoundError, "hedwig fetch", {"source": "vllm", "model": "internvideo2.5-8b"}, {}),
        (ValueError, "images=frames", {"source": "vllm", "model": model, "images": "sheet"}, {}),
        (ImportError, r"hedwig\[captions\]", {"source": "vllm", "model": model}, {}),
    ]
    monkeypatch.setenv("HEDWIG_CACHE", str(tmp_path / "cache"))
    for error, says, section, more in cases:
        settings = {"output": str(tmp_path / "run"), "encoder": {"name": "viclip-tiny"}, "captions": section, **more}
        with pytest.raises(error, match=says):
            check_captions(validate_experiment(settings), ["caption"])
        check_captions(validate_experiment(settings), ["embed"])
    here = {**api, "base_url": "http://127.0.0.1:9/v1"}
    check_captions(validate_experiment({"output": str(tmp_path / "run"), "captions": here}), ["caption"])
