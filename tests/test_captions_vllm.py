"""Requests for a vLLM engine: their shapes on both routes, the engine's settings as Ray takes them, and its answers."""

from __future__ import annotations

import base64
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_vlm import make_tiny_internvl

from hedwig.captions.prompts import MOST_TOKENS, describe
from hedwig.captions.vllm import (
    INTERNVL_CHAT,
    answer_of,
    chat_format,
    condense_request,
    engine_settings,
    joined,
    said,
    vllm_request,
)


@pytest.fixture
def frames():
    shades = np.arange(8, dtype=np.uint8)[:, None, None, None] * 30
    return np.broadcast_to(shades, (8, 640, 640, 3)).copy()


def test_prompt_route_is_internvl_chat_with_one_tile_per_frame(frames):
    row = vllm_request(frames, route="prompt", max_frames=4)
    images = row["multimodal_data"]["image"]
    assert [image.size for image in images] == [(448, 448)] * 4
    assert [np.asarray(image)[0, 0, 0] for image in images] == [0, 60, 120, 180]
    user = "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nFrame4: <image>\n" + describe("basic", 4)
    assert row["prompt"] == INTERNVL_CHAT.replace("{user}", user)
    assert row["prompt"].startswith("<|im_start|>system\n")
    assert row["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert row["mm_processor_kwargs"] == {"max_dynamic_patch": 1}
    assert row["sampling_params"]["temperature"] == 0.0
    assert row["sampling_params"]["max_tokens"] == MOST_TOKENS["basic"]
    assert "<|im_end|>" in row["sampling_params"]["stop"]
    assert set(row) == {"prompt", "multimodal_data", "mm_processor_kwargs", "sampling_params"}


def test_messages_route_is_openai_content_in_order(frames):
    row = vllm_request(frames, route="messages", prompt="verbose", max_new_tokens=99)
    assert set(row) == {"messages", "sampling_params"}
    assert "stop" not in row["sampling_params"], "the model's own end tokens apply"
    (message,) = row["messages"]
    content = message["content"]
    assert [part["type"] for part in content] == ["text", "image_url"] * 8 + ["text"]
    assert [part["text"] for part in content[:-1:2]] == [f"Frame{index}: " for index in range(1, 9)]
    assert content[-1]["text"].strip() == describe("verbose", 8)
    for index, part in enumerate(content[1::2]):
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.size == (448, 448)
            assert abs(int(np.asarray(image)[200, 200, 0]) - 30 * index) <= 2
    json.dumps(row["messages"])  # text only: no pickled pictures


def test_second_step_is_text_alone():
    asked = {"token_budget": 75, "tokenizer": "clip"}
    prompt = condense_request("Red soil and palms.", route="prompt", **asked)
    assert set(prompt) == {"prompt", "sampling_params"}
    assert "<image>" not in prompt["prompt"]
    assert "Red soil and palms." in prompt["prompt"]
    messages = condense_request("Red soil and palms.", route="messages", **asked)
    assert messages["messages"][0]["content"] in prompt["prompt"]


def test_chat_format_is_the_folders_own(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert chat_format(tmp_path) == INTERNVL_CHAT
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}" + (
        "{% if add_generation_prompt %} [answer]{% endif %}"
    )
    settings = {"chat_template": template, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat_format(tmp_path) == "<s>[user] {user} [answer]"
    own = chat_format(make_tiny_internvl(tmp_path / "tiny"))
    assert own == "<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    assert vllm_request(frames, route="prompt", chat=own)["prompt"].startswith("<|im_start|>user\nFrame1: <image>\n")
    with pytest.raises(ValueError, match="where the message goes"):
        vllm_request(frames, route="prompt", chat="no place")


@pytest.mark.parametrize("route", ["prompt", "messages"])
def test_engine_settings_make_room_for_the_requests(route):
    settings = engine_settings("a/model", route=route, num_frames=10, max_frames=8, max_new_tokens=512, revision="abc")
    engine = settings["engine_kwargs"]
    assert engine["limit_mm_per_prompt"] == {"image": 8}
    assert engine["max_model_len"] % 1024 == 0
    assert engine["max_model_len"] >= 8 * 256 + 512 + 512
    assert engine["revision"] == engine["tokenizer_revision"] == "abc"
    assert engine["trust_remote_code"] is False
    assert settings["should_continue_on_error"] is True
    enabled = {name: value["enabled"] for name, value in settings.items() if name.endswith("_stage")}
    by_ray = route == "messages"
    assert enabled["prepare_multimodal_stage"] is enabled["chat_template_stage"] is by_ray
    assert enabled["tokenize_stage"] is enabled["detokenize_stage"] is False


@pytest.mark.parametrize("route", ["prompt", "messages"])
def test_ray_takes_the_settings(route):
    llm = pytest.importorskip("ray.data.llm", reason="this Ray was installed without its llm parts")
    settings = engine_settings("a/model", route=route, num_frames=8, accelerator_type="A100", concurrency=2)
    config = llm.vLLMEngineProcessorConfig(**settings)
    assert config.model_source == "a/model"
    assert config.engine_kwargs["limit_mm_per_prompt"] == {"image": 8}
    assert config.batch_size == 16
    assert config.should_continue_on_error is True


def test_neither_ray_nor_vllm_is_imported_by_the_module():
    import subprocess

    code = "import sys, hedwig.captions.vllm as m; assert not {'ray', 'vllm', 'torch'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_engines_answers_of_one_and_of_two_steps():
    row = {"generated_text": " Caption: A road.", "num_input_tokens": 2100, "num_generated_tokens": 9}
    answer = answer_of(said(row))
    assert (answer.text, answer.detail, answer.failure) == (" Caption: A road.", "", None)
    assert (answer.prompt_tokens, answer.completion_tokens) == (2100, 9)
    second = {"generated_text": "Red soil", "num_input_tokens": 100, "num_generated_tokens": 3}
    both = answer_of(joined(said(row), said(second)))
    assert (both.text, both.detail) == ("Red soil", "A road.")
    assert (both.prompt_tokens, both.completion_tokens) == (2200, 12)


def test_an_engines_error_is_the_rows_failure():
    bad = {"content_hash": "a", "generated_text": None, "__inference_error__": "ValueError: prompt too long"}
    assert answer_of(bad).failure == "the model failed: ValueError: prompt too long"
    later = {**bad, "text": "a detailed text", "prompt_tokens": 7, "completion_tokens": 3}
    assert (answer_of(later).text, answer_of(later).prompt_tokens, answer_of(later).completion_tokens) == ("", 7, 3)
    assert answer_of({**said({"generated_text": "x"}), "__inference_error__": ""}).failure is None


def test_answers_may_be_as_long_as_the_prompt_asks(frames):
    for prompt in ("basic", "verbose", "two-step"):
        asked = vllm_request(frames, route="messages", prompt=prompt)["sampling_params"]["max_tokens"]
        assert asked == MOST_TOKENS[prompt]
        room = engine_settings("m", route="messages", prompt=prompt, num_frames=8)["engine_kwargs"]["max_model_len"]
        assert room >= 8 * 256 + 2 * asked
    condensed = condense_request("x", route="messages", token_budget=75, tokenizer="clip")
    assert condensed["sampling_params"]["max_tokens"] == 225


def test_unknown_route_is_refused(frames):
    with pytest.raises(ValueError, match="messages"):
        vllm_request(frames, route="video")
    with pytest.raises(ValueError, match="messages"):
        engine_settings("m", route="video", num_frames=8)
    with pytest.raises(ValueError, match="num_frames is 0"):
        engine_settings("m", route="prompt", num_frames=0)
