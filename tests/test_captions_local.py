"""The captioner that runs transformers: loaded from a folder, frames labelled one tile each, rows independent."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_vlm import make_tiny_internvl, make_tiny_qwen

from hedwig.captions.folders import weights_digest
from hedwig.captions.local import TransformersCaptioner
from hedwig.captions.prompts import MOST_TOKENS, describe
from hedwig.captions.result import CAPTION_COLUMNS
from hedwig.models.fetched import file_sha256
from hedwig.models.viclip import count_tokens

TOKENS_PER_FRAME = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return make_tiny_internvl(tmp_path_factory.mktemp("internvl"), seed=1)


@pytest.fixture(scope="module")
def captioner(folder):
    return TransformersCaptioner(model=str(folder), label="tiny", revision="r1", max_new_tokens=24, device="cpu")


@pytest.fixture
def frames():
    """One noisy, one black and one dark panorama; this random model says something else about the first."""
    noise = np.random.default_rng(3).integers(0, 256, (3, 4, 64, 64, 3), dtype=np.uint8)
    return noise // np.array([1, 255, 4], np.uint8)[:, None, None, None, None]


def test_writes_the_columns_and_keeps_the_others(captioner, frames):
    out = captioner({"frames": frames, "content_hash": np.array(["a", "b", "c"], object)})
    assert set(out) == {"frames", "content_hash", *CAPTION_COLUMNS}
    assert out["caption_model"].tolist() == ["transformers:tiny@r1"] * 3
    for caption, num in zip(out["caption"], out["caption_num_tokens"], strict=True):
        assert caption
        assert num == count_tokens(caption) <= 30
    assert out["caption_detail"].tolist() == [""] * 3
    assert 1 <= out["caption_completion_tokens"].min() <= out["caption_completion_tokens"].max() <= 24


def test_prompt_is_one_labelled_tile_per_frame(captioner, frames, monkeypatch):
    seen = {}
    processor = captioner._processor

    def record(**arguments):
        seen["inputs"] = processor(**arguments)
        seen["text"] = arguments["text"]
        return seen["inputs"]

    monkeypatch.setattr(captioner, "_processor", _Wrapped(processor, record))
    read = captioner({"frames": frames[:2]})["caption_prompt_tokens"]
    assert seen["text"][0].count("<IMG_CONTEXT>\n") == 4
    assert "Frame1: <IMG_CONTEXT>\nFrame2: <IMG_CONTEXT>\n" in seen["text"][0]
    assert seen["text"][0].endswith(describe("basic", 4) + "<|im_end|>\n<|im_start|>assistant\n")
    # One tile of four tokens per frame, though this processor's own setting cuts pictures into tiles.
    assert tuple(seen["inputs"]["pixel_values"].shape) == (2 * 4, 3, 56, 56)
    image_token = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert int((seen["inputs"]["input_ids"] == image_token).sum()) == 2 * 4 * TOKENS_PER_FRAME
    assert read.tolist() == [seen["inputs"]["input_ids"].shape[1]] * 2


class _Wrapped:
    def __init__(self, inner, call):
        self.inner, self.call = inner, call

    def __call__(self, **arguments):
        return self.call(**arguments)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_repeats_itself_and_rows_do_not_mix(folder, captioner, frames):
    one_by_one = TransformersCaptioner(
        model=str(folder), label="tiny", revision="r1", max_new_tokens=24, device="cpu", batch_size=1
    )
    first, again, alone = (stage({"frames": frames}) for stage in (captioner, captioner, one_by_one))
    for name in CAPTION_COLUMNS:
        assert first[name].tolist() == again[name].tolist() == alone[name].tolist()
    assert len(set(first["caption"])) > 1, "the pictures must matter, or this test says nothing"


def test_greedy_answer_equals_a_slow_decoding_loop(captioner, frames):
    prompts = [captioner._render([{"type": "image"}, {"type": "text", "text": "Describe."}])]
    from PIL import Image

    image = [[Image.fromarray(frames[0, 0])]]
    text, _, written = captioner._generate(prompts, image, 24)[0]
    inputs = captioner._processor(text=prompts, images=image, return_tensors="pt", crop_to_patches=False)
    ids = inputs["input_ids"]
    new = []
    with torch.inference_mode():
        while len(new) < 24:
            logits = captioner._network(
                input_ids=ids, pixel_values=inputs["pixel_values"], attention_mask=torch.ones_like(ids)
            ).logits
            new.append(int(logits[0, -1].argmax()))
            if new[-1] in captioner._ends:
                break
            ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
    assert captioner._processor.tokenizer.decode(new, skip_special_tokens=True) == text
    assert written == len(new)


def test_two_steps_keep_the_detail_and_count_both(folder, frames):
    captioner = TransformersCaptioner(
        model=str(folder), prompt="two-step", tokenizer="clip", token_budget=75, max_new_tokens=12, device="cpu",
        max_frames=2, leaks="off",
    )  # fmt: skip
    asked = []
    render = captioner._render
    captioner._render = lambda content: asked.append(content) or render(content)
    out = captioner({"frames": frames[:2]})
    assert all(out["caption_detail"])
    assert sum(part["type"] == "image" for part in asked[0]) == 2
    assert len(asked[1:]) == 2
    for request, detail in zip(asked[1:], out["caption_detail"], strict=True):
        assert [part["type"] for part in request] == ["text"]
        assert detail in request[0]["text"]
        assert "at most 50 words" in request[0]["text"]
    assert (out["caption_completion_tokens"] > 12).all()
    assert (out["caption_num_tokens"] <= 75).all()


def test_a_row_that_fails_leaves_the_others_alone(captioner, frames, monkeypatch):
    expected = captioner({"frames": frames})["caption"]
    generate = captioner._generate

    def fragile(prompts, images, most):
        if any(np.asarray(image).max() == 0 for row in images for image in row):
            raise RuntimeError("out of memory")
        return generate(prompts, images, most)

    monkeypatch.setattr(captioner, "_generate", fragile)
    broken = frames.copy()
    broken[1] = 0
    out = captioner({"frames": broken})
    assert out["failure"][0] is None
    assert out["failure"][2] is None
    assert "RuntimeError: out of memory" in out["failure"][1]
    assert out["caption"][[0, 2]].tolist() == expected[[0, 2]].tolist()


def test_version_of_the_weights_is_in_the_model_name(folder, tmp_path):
    captioner = TransformersCaptioner(model=str(folder), device="cpu")
    name, _, digest = captioner.caption_model.rpartition("@")
    assert name == f"transformers:{folder.name}"
    assert len(digest) == 12
    other = make_tiny_internvl(tmp_path / folder.name, seed=2)
    assert TransformersCaptioner(model=str(other), device="cpu").caption_model not in ("", captioner.caption_model)


def test_the_weights_digest_follows_every_file_and_the_record_of_a_fetch(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert weights_digest(copy) == weights_digest(folder)
    weights = copy / "model.safetensors"
    files = [
        {"path": one.name, "size": one.stat().st_size, "sha256": file_sha256(one), "checked": ""}
        for one in copy.iterdir()
    ]
    (copy / "source.json").write_text(json.dumps({"files": files}))
    assert weights_digest(copy) == weights_digest(folder)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_digest(copy) == weights_digest(folder), "the record of the fetch saves the reading"
    (copy / "source.json").unlink()
    assert weights_digest(copy) != weights_digest(folder)


def test_answers_may_be_as_long_as_the_prompt_asks(folder, frames):
    captioner = TransformersCaptioner(model=str(folder), revision="r", prompt="two-step", device="cpu")
    asked = []
    captioner._generate = lambda prompts, images, most: asked.append(most) or [("a road", 1, 1)] * len(prompts)
    captioner({"frames": frames})
    assert asked == [MOST_TOKENS["two-step"], 90]


def test_qwen_has_no_line_break_of_its_own(tmp_path, frames):
    captioner = TransformersCaptioner(model=str(make_tiny_qwen(tmp_path / "qwen")), max_new_tokens=8, device="cpu")
    assert captioner._break == "\n"
    out = captioner({"frames": frames})
    assert all(out["caption"])
    assert "failure" not in out


def test_what_is_no_native_model_is_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"safetensors"):
        TransformersCaptioner(model=str(tmp_path))
    # InternVL's own form: its class lives in Python files of the repository, which are never run.
    remote = {"model_type": "internvl_chat", "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}}
    (tmp_path / "config.json").write_text(json.dumps(remote))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "modeling_internvl_chat.py").write_text("raise SystemExit('remote code was run')\n")
    with pytest.raises(ValueError, match=r"native form"):
        TransformersCaptioner(model=str(tmp_path))


@pytest.mark.parametrize(
    ("setting", "named"),
    [({"batch_size": 0}, "batch_size"), ({"token_budget": 31}, "token_budget"), ({"prompt": "long"}, "two-step")],
)
def test_settings_are_checked_before_the_model_is_read(setting, named):
    with pytest.raises(ValueError, match=named):
        TransformersCaptioner(model="nowhere", **setting)
