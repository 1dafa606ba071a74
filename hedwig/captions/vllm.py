"""Requests for a vLLM engine inside a Ray Data flow, and its answers as caption rows; the flow itself is not here.

Two routes. "prompt" hands the engine finished text and pictures, with no stage of Ray's before it: for InternVL chat
models, InternVideo2.5 among them, which vLLM reads as a plain InternVLChatModel without its video compression, so that
its words differ from those of its own code. "messages" hands over OpenAI messages and lets Ray and vLLM apply the
model's own chat template: for Qwen3-VL and other models with a native processor. Either way a frame is one picture of
448 px, 256 tokens in InternVL; at 640 px its dynamic tiling would make five tiles of each.

`trust_remote_code` is never set. The released InternVideo2.5 brings its configuration and tokenizer as Python files, so
an engine in this process refuses it; serve it apart from here and use the captioner for OpenAI's protocol. A row that
the engine fails on carries its error to the end of the flow, where `answer_of` makes a failure of it.
Neither vLLM nor Ray is imported.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hedwig.captions.prompts import (
    PromptName,
    TokenizerName,
    choose_frames,
    clean,
    condense,
    describe,
    jpeg,
    most_tokens,
    shown_frames,
)
from hedwig.captions.result import Answer

__all__ = [
    "INTERNVL_CHAT",
    "Route",
    "answer_of",
    "chat_format",
    "condense_request",
    "engine_settings",
    "joined",
    "said",
    "vllm_request",
]

Route = Literal["prompt", "messages"]

FRAME_PX = 448  # InternVL's tile
INTERNVL_TOKENS_PER_TILE = 256
SYSTEM = "You describe street scenes from what is visible."
# The conversation format "internvl2_5" of InternVL's own code; {user} is replaced by the message.
INTERNVL_CHAT = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{{user}}<|im_end|>\n<|im_start|>assistant\n"
INTERNVL_STOPS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>")


def vllm_request(
    frames: NDArray[np.uint8],
    *,
    route: Route,
    prompt: PromptName = "basic",
    max_frames: int | None = None,
    frame_px: int = FRAME_PX,
    max_new_tokens: int | None = None,
    chat: str = INTERNVL_CHAT,
) -> dict[str, Any]:
    """The columns of one row for the engine: a panorama's frames and what is asked about them.

    Args:
        frames: (V, S, S, 3) uint8 RGB.
        route: "prompt" or "messages", as in `engine_settings`.
        prompt: kind of caption; "two-step" asks for the detailed text, see `condense_request`.
        max_frames: most frames shown, chosen evenly; None shows all.
        frame_px: frames larger than this are made smaller; keep 448 for InternVL.
        max_new_tokens: longest answer, in the model's tokens; None: `most_tokens` of the prompt.
        chat: on the "prompt" route the model's chat format with ``{user}`` in it; see `chat_format`.

    Returns:
        sampling_params, and either prompt (str), multimodal_data ({"image": PIL images}) and mm_processor_kwargs, or
        messages with the frames as JPEG data URLs.
    """
    _check_route(route)
    most = most_tokens(prompt, None, "clip") if max_new_tokens is None else max_new_tokens
    images = shown_frames(frames, max_frames, frame_px)
    asked = describe(prompt, len(images))
    if route == "prompt":
        labelled = "".join(f"Frame{index + 1}: <image>\n" for index in range(len(images)))
        return {
            **_text_request(labelled + asked, route, most, chat),
            "multimodal_data": {"image": images},
            "mm_processor_kwargs": {"max_dynamic_patch": 1},
        }
    content: list[dict[str, Any]] = []
    for index, image in enumerate(images):
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg(np.asarray(image), 92)).decode()
        content.append({"type": "text", "text": f"Frame{index + 1}: "})
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": "\n" + asked})
    return {"messages": [{"role": "user", "content": content}], "sampling_params": _sampling(route, most)}


def condense_request(
    detailed: str,
    *,
    route: Route,
    token_budget: int | None,
    tokenizer: TokenizerName,
    max_new_tokens: int | None = None,
    chat: str = INTERNVL_CHAT,
) -> dict[str, Any]:
    """The columns of the second step's row, text only; `detailed` is the first step's ``generated_text``."""
    _check_route(route)
    if max_new_tokens is None:
        max_new_tokens = most_tokens("two-step", token_budget, tokenizer, reading=True)
    return _text_request(condense(detailed, token_budget, tokenizer), route, max_new_tokens, chat)


def _text_request(text: str, route: Route, max_new_tokens: int, chat: str) -> dict[str, Any]:
    sampling = _sampling(route, max_new_tokens)
    if route == "messages":
        return {"messages": [{"role": "user", "content": text}], "sampling_params": sampling}
    if "{user}" not in chat:
        raise ValueError(f"chat is {chat!r}; a chat format has {{user}} where the message goes.")
    return {"prompt": chat.replace("{user}", text), "sampling_params": sampling}


def _sampling(route: Route, max_new_tokens: int) -> dict[str, Any]:
    """Greedy decoding; the engine undoes its own tokens, as Ray's stage for that is off on the "prompt" route."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_new_tokens, "seed": 0, "detokenize": True}
    return {**greedy, "stop": list(INTERNVL_STOPS)} if route == "prompt" else greedy


def chat_format(folder: str | Path) -> str:
    """The chat format of a model's folder with ``{user}`` in it; `INTERNVL_CHAT` where the folder has no template.

    The template is text that transformers renders in a sandbox; the folder's code is not run.
    """
    folder = Path(folder)
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(template, str):
        return INTERNVL_CHAT
    from transformers.utils.chat_template_utils import render_jinja_template

    def token(name: str) -> str:
        value = settings.get(name)
        return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")

    rendered, _ = render_jinja_template(
        conversations=[[{"role": "user", "content": "{user}"}]],
        chat_template=template,
        add_generation_prompt=True,
        bos_token=token("bos_token"),
        eos_token=token("eos_token"),
    )
    return str(rendered[0])


def engine_settings(
    model: str,
    *,
    route: Route,
    num_frames: int,
    prompt: PromptName = "basic",
    max_frames: int | None = None,
    frame_px: int = FRAME_PX,
    max_new_tokens: int | None = None,
    revision: str | None = None,
    concurrency: int = 1,
    batch_size: int = 16,
    accelerator_type: str | None = None,
    tensor_parallel: int = 1,
    memory_share: float = 0.9,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of ``ray.data.llm.vLLMEngineProcessorConfig`` for these requests.

    Rows carry their pictures through the flow, so batches are small and a row that fails is returned with its error
    (`answer_of` reads it) rather than ending the job.

    Args:
        model: folder or repository name of the weights.
        route: as in `vllm_request`.
        num_frames: V, frames of a panorama.
        prompt: as in `vllm_request`.
        max_frames: as in `vllm_request`; so many pictures the engine makes room for.
        frame_px: as in `vllm_request`.
        max_new_tokens: the longest answer of any request, of the second step too; None: of the prompt.
        revision: commit of a repository.
        concurrency: engines.
        batch_size: rows per batch.
        accelerator_type: Ray's name of the GPU, None for any.
        tensor_parallel: GPUs per engine.
        memory_share: share of the GPU's memory that the engine takes, above 0 and at most 1.
        seed: the engine's.
    """
    _check_route(route)
    if num_frames < 1 or not 0 < memory_share <= 1:
        raise ValueError(f"num_frames is {num_frames} and memory_share {memory_share}; use 1 or more, and (0, 1].")
    pictures = len(choose_frames(num_frames, max_frames))
    per_picture = max(INTERNVL_TOKENS_PER_TILE, math.ceil(frame_px / 28) ** 2) + 16  # and its label
    if max_new_tokens is None:
        steps = (False, True) if prompt == "two-step" else (False,)
        max_new_tokens = max(most_tokens(prompt, None, "clip", reading=reading) for reading in steps)
    # The second step reads the first's answer, so an answer counts twice; 1,024 for the instructions.
    room = pictures * per_picture + 2 * max_new_tokens + 1024
    engine: dict[str, Any] = {
        "limit_mm_per_prompt": {"image": pictures},
        "max_model_len": 1024 * math.ceil(room / 1024),
        "tensor_parallel_size": tensor_parallel,
        "gpu_memory_utilization": memory_share,
        "trust_remote_code": False,
        "seed": seed,
    }
    if revision is not None:
        engine |= {"revision": revision, "tokenizer_revision": revision}
    settings: dict[str, Any] = {
        "model_source": model,
        "engine_kwargs": engine,
        "concurrency": concurrency,
        "batch_size": batch_size,
        "accelerator_type": accelerator_type,
        "should_continue_on_error": True,
    }
    if route == "prompt":
        engine["mm_processor_kwargs"] = {"max_dynamic_patch": 1}  # also for the engine's own memory profile
        off = ("prepare_multimodal_stage", "chat_template_stage", "tokenize_stage", "detokenize_stage")
        return {**settings, **{name: {"enabled": False} for name in off}}
    prepare: dict[str, Any] = {"trust_remote_code": False, "limit_mm_per_prompt": engine["limit_mm_per_prompt"]}
    if revision is not None:
        prepare["revision"] = revision
    return {
        **settings,
        "prepare_multimodal_stage": {
            "enabled": True,
            "chat_template_content_format": "openai",
            "model_config_kwargs": prepare,
        },
        "chat_template_stage": {"enabled": True},
        "tokenize_stage": {"enabled": False},  # the engine tokenizes and puts the pictures in
        "detokenize_stage": {"enabled": False},
    }


def said(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the engine returned of one row, as plain columns: text, detail (empty), prompt_ and completion_tokens."""
    return {
        "text": str(row.get("generated_text") or ""),
        "detail": "",
        "prompt_tokens": int(row.get("num_input_tokens") or 0),
        "completion_tokens": int(row.get("num_generated_tokens") or 0),
    }


def joined(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Both steps' answer: the second's text, the first's as detail, the tokens of both."""
    tokens = {name: int(before[name]) + int(after[name]) for name in ("prompt_tokens", "completion_tokens")}
    return {"text": after["text"], "detail": clean(before["text"]), **tokens}


def answer_of(row: Mapping[str, Any]) -> Answer:
    """The answer in a row at the end of the flow.

    A row that failed in the engine comes with ``__inference_error__`` and whatever columns it had, for Ray does not
    hand it to `said`; where the second step failed, the tokens of the first are among them.
    """
    read, written = (int(row.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    error = str(row.get("__inference_error__") or "")
    if error:
        return Answer("", "", read, written, f"the model failed: {error[:300]}")
    return Answer(str(row.get("text") or ""), str(row.get("detail") or ""), read, written)


def _check_route(route: str) -> None:
    if route not in get_args(Route):
        raise ValueError(f"There is no route {route!r}; use 'prompt' for InternVL chat models, else 'messages'.")
