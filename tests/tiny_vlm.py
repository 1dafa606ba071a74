"""Tiny random vision-language models in the native transformers layout: real classes, real processors, no weights.

What they say is noise; what they test is everything around it: loading, prompts, frames, batches, tokens. A folder is
built in about a second and is the same for the same seed.
"""

from __future__ import annotations

from pathlib import Path

import torch

FRAME_PX = 56
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_CORPUS = (
    "a wide grey asphalt road with white lines and wooden utility poles",
    "low brick houses with red tile roofs behind green hedges and tall trees",
    "dry grass and sandy soil under a clear blue sky with no visible traffic",
    "Frame 1: describe the place in one plain sentence of words, user assistant system",
)
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}{{ 'IMAGE' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 64, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def _tokenizer(**extra):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        extra_special_tokens=extra,
    )  # fmt: skip


def _save(model, processor, folder):
    """Readable words are made likelier than bytes, so that an answer is text."""
    tokenizer = processor.tokenizer
    text = [index for index in range(len(tokenizer)) if len(tokenizer.decode([index]).strip()) > 2]
    words = [index for index in text if index not in tokenizer.all_special_ids]
    with torch.no_grad():
        head = model.get_output_embeddings()
        others = torch.ones(len(head.weight), dtype=torch.bool)
        others[words] = False
        head.weight[others] *= 1e-3
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.eval().save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
    return Path(folder)


def make_tiny_internvl(folder, seed=0):
    """A native InternVL (`internvl`) of 2 + 2 layers, 4 tokens per frame; returns the folder as a Path."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    tokenizer = _tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    size = {"height": FRAME_PX, "width": FRAME_PX}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=12),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\\n"),
    )
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
            "image_size": [FRAME_PX, FRAME_PX], "patch_size": [14, 14],
        },
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), "tie_word_embeddings": False, **_TEXT},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return _save(InternVLForConditionalGeneration(config), processor, folder)


def make_tiny_qwen(folder, seed=0):
    """A native Qwen2.5-VL (`qwen2_5_vl`) of 2 + 2 layers; returns the folder as a Path."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    image = {"min_pixels": 28 * 28, "max_pixels": FRAME_PX * FRAME_PX}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**image),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
        text_config={
            "vocab_size": len(tokenizer), "tie_word_embeddings": False, **_TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return _save(Qwen2_5_VLForConditionalGeneration(config), processor, folder)
