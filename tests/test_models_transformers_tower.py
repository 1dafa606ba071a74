"""Models of transformers from local folders, made here with random weights: CLIP, SigLIP 2, DINOv2 and v3, ResNet."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hedwig.models.clip import TINY_CLIP, MeanCLIP, tiny_clip
from hedwig.models.encoder import VideoTextEncoder, encoder_spec, load_encoder
from hedwig.models.transformers_tower import load_transformers
from hedwig.models.viclip import TINY

CAPTIONS = ["a red house", "Two palm trees, by the sea!", "word " * 50]
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**VISION, "hidden_size": 24, "vocab_size": 12, "max_position_embeddings": 6}


def frames_of(px: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 3, px, px, 3), dtype=np.uint8)


def write_preprocessing(folder: Path, px: int, **settings: Any) -> None:
    content = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.5], "size": {"height": px, "width": px}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**content, **settings}))


def save_model(config: Any, folder: Path, px: int, **settings: Any) -> Any:
    """A random model of `config` in a folder, all of its weights moved a little, so that none is zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    write_preprocessing(folder, px, **settings)
    return model


def normalised(frames: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    scaled = (frames.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(scaled).float().flatten(0, 1).movedim(-1, 1)


def expect_frames(encoder: VideoTextEncoder, frames: np.ndarray, features: torch.Tensor) -> None:
    each = torch.nn.functional.normalize(features, dim=-1).reshape(2, 3, -1).numpy()
    np.testing.assert_allclose(encoder.encode_each_frame(frames), each, atol=1e-5)
    mean = each.mean(axis=1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode_frames(frames), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-4


def words_tokeniser(folder: Path) -> None:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "red": 4, "house": 5, "word": 6}
    tokeniser = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokeniser.pre_tokenizer = pre_tokenizers.Whitespace()
    tokeniser.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokeniser, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def clip_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's state dict under the names of `transformers.CLIPModel`."""
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "logit_scale": "logit_scale",
    }
    for end in ("weight", "bias"):
        names[f"visual.ln_pre.{end}"] = f"vision_model.pre_layrnorm.{end}"
        names[f"visual.ln_post.{end}"] = f"vision_model.post_layernorm.{end}"
        names[f"ln_final.{end}"] = f"text_model.final_layer_norm.{end}"
    out = {
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": state["text_projection"].T.contiguous(),
    }
    for key, value in state.items():
        before, found, after = key.partition("transformer.resblocks.")
        if found:
            number, part = after.split(".", 1)
            place = f"{'vision' if before else 'text'}_model.encoder.layers.{number}."
            if part.startswith("attn.in_proj_"):
                for which, third in zip("qkv", value.chunk(3), strict=True):
                    out[f"{place}self_attn.{which}_proj.{part.removeprefix('attn.in_proj_')}"] = third.contiguous()
            else:
                stem, _, end = part.rpartition(".")
                out[f"{place}{parts[stem]}.{end}"] = value
        elif key in names:
            out[names[key]] = value
    return out


@pytest.fixture(scope="module")
def clip() -> MeanCLIP:
    return tiny_clip(4)


@pytest.fixture(scope="module")
def clip_folder(clip: MeanCLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `clip` in the layout of transformers, as its published CLIPs are laid out."""
    folder = tmp_path_factory.mktemp("clip")
    text, act = TINY_CLIP["text_cfg"], "quick_gelu"
    config = transformers.CLIPConfig(
        projection_dim=TINY.embed_dim,
        vision_config={
            "hidden_size": TINY.vision_width,
            "intermediate_size": 4 * TINY.vision_width,
            "num_hidden_layers": TINY.vision_layers,
            "num_attention_heads": TINY.vision_heads,
            "image_size": TINY.frame_px,
            "patch_size": TINY.patch_px,
            "hidden_act": act,
        },
        text_config={
            "hidden_size": TINY.text_width,
            "intermediate_size": 4 * TINY.text_width,
            "num_hidden_layers": TINY.text_layers,
            "num_attention_heads": TINY.text_heads,
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "hidden_act": act,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
    )
    model = transformers.CLIPModel(config)
    model.load_state_dict(clip_state(clip.model.state_dict()))
    model.save_pretrained(folder)
    bpe = SimpleTokenizer()
    merges = [" ".join(pair) for pair in sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.get)]
    special = {49406: "<|startoftext|>", 49407: "<|endoftext|>"}  # open_clip renames the two
    vocabulary = {special.get(number, token): number for token, number in bpe.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    px = {"height": TINY.frame_px, "width": TINY.frame_px}
    write_preprocessing(
        folder,
        0,
        image_mean=list(clip.mean),
        image_std=list(clip.std),
        size={"shortest_edge": 2 * TINY.frame_px},
        do_center_crop=True,
        crop_size=px,
    )
    return folder


def test_clip_agrees_with_open_clips(clip: MeanCLIP, clip_folder: Path) -> None:
    encoder = load_encoder("transformers:some-clip", weights=str(clip_folder), device="cpu")
    frames = frames_of(TINY.frame_px)
    assert (encoder.frame_px, encoder.image_dim, encoder.text_dim, encoder.has_text) == (64, 128, 128, True)
    assert encoder.truncated(CAPTIONS).tolist() == [False, False, True]
    assert torch.equal(encoder.module.tokenise(CAPTIONS[:2])[0][:, :4], clip.tokenise(CAPTIONS[:2])[0][:, :4])
    with torch.inference_mode():
        ours = clip.each_frame_uint8(torch.from_numpy(frames)), clip.encode_text(CAPTIONS)
    np.testing.assert_allclose(encoder.encode_each_frame(frames), ours[0], atol=2e-6)
    np.testing.assert_allclose(encoder.encode_text(CAPTIONS), ours[1], atol=2e-6)
    settings = [encoder.weights_digest, list(clip.mean), list(clip.std), 64]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    assert encoder.model_id == f"transformers:some-clip@{digest[:12]}"
    spec = encoder_spec("transformers:some-clip", str(clip_folder))
    assert (spec.frame_px, spec.num_frames, spec.image_dim, spec.text_dim, spec.has_text) == (64, 8, 128, 128, True)
    half = load_encoder("transformers:some-clip", weights=str(clip_folder), device="cpu", dtype="bfloat16")
    assert (half.encode_frames(frames) * encoder.encode_frames(frames)).sum(axis=1).min() > 0.999


def test_siglip_of_fixed_resolution(tmp_path: Path) -> None:
    vision = {**VISION, "image_size": 32, "patch_size": 16}
    config = transformers.SiglipConfig(vision_config=vision, text_config={**TEXT, "projection_size": 32})
    model = save_model(config, tmp_path, 32)
    words_tokeniser(tmp_path)
    encoder = load_encoder("transformers:siglip2", weights=str(tmp_path), device="cpu")
    frames = frames_of(32)
    pixels = normalised(frames, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    with torch.inference_mode():
        expect_frames(encoder, frames, model.vision_model(pixel_values=pixels).pooler_output)
        ids = torch.tensor([[3, 4, 5, 1, 0, 0], [6, 6, 6, 6, 6, 1]])
        text = model.text_model(input_ids=ids).pooler_output  # padding in sight, as in training
    captions = ["a red house", "word word word word word"]
    assert encoder.module.tokenise(captions)[0].tolist() == ids.tolist()
    assert encoder.truncated([*captions, "word " * 6]).tolist() == [False, False, True]
    np.testing.assert_allclose(encoder.encode_text(captions), torch.nn.functional.normalize(text, dim=-1), atol=1e-6)
    assert (encoder.image_dim, encoder.text_dim) == (32, 32)


def test_siglip_2_of_variable_resolution(tmp_path: Path) -> None:
    vision = {**VISION, "num_patches": 16, "patch_size": 8}
    config = transformers.Siglip2Config(vision_config=vision, text_config={**TEXT, "projection_size": 32})
    model = save_model(config, tmp_path, 32)
    words_tokeniser(tmp_path)
    encoder = load_encoder("transformers:naflex", weights=str(tmp_path), device="cpu")
    frames = frames_of(32)
    processor = transformers.Siglip2ImageProcessor(
        patch_size=8, max_num_patches=16, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.5]
    )
    inputs = processor(images=list(frames.reshape(-1, 32, 32, 3)), return_tensors="pt")
    assert inputs["spatial_shapes"].tolist() == [[4, 4]] * 6
    with torch.inference_mode():
        expect_frames(encoder, frames, model.get_image_features(**inputs).pooler_output)


def image_only() -> dict[str, tuple[Any, int]]:
    vit = {**VISION, "patch_size": 8}
    return {
        "dinov2": (transformers.Dinov2Config(**vit, image_size=48), 32),  # fed less than it was trained on, as released
        "dinov3": (transformers.DINOv3ViTConfig(**vit, image_size=32, num_register_tokens=2), 32),
        "convnext": (transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]), 64),
        "resnet": (transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]), 64),
    }


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "convnext", "resnet"])
def test_image_only_models(tmp_path: Path, kind: str) -> None:
    config, px = image_only()[kind]
    model = save_model(config, tmp_path, px)
    encoder = load_encoder(f"transformers:{kind}", weights=str(tmp_path), device="cpu", fusion="max_sim")
    assert (encoder.frame_px, encoder.image_dim, encoder.text_dim, encoder.has_text) == (px, 32, 1, False)
    frames = frames_of(px)
    with torch.inference_mode():
        pooled = model(pixel_values=normalised(frames, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))).pooler_output
    expect_frames(encoder, frames, pooled.flatten(1))
    assert encoder.encode_text(["a"]).tolist() == [[0.0]]
    assert encoder.model_id.endswith("+max_sim")
    spec = encoder_spec(f"transformers:{kind}", str(tmp_path))
    assert (spec.frame_px, spec.image_dim, spec.text_dim, spec.has_text) == (px, 32, 1, False)


@pytest.fixture
def dino(tmp_path: Path) -> Path:
    config, px = image_only()["dinov2"]
    save_model(config, tmp_path, px)
    return tmp_path


def test_loading_is_strict(dino: Path) -> None:
    file = dino / "model.safetensors"
    state = load_file(file)
    key = "layernorm.bias"
    for changed, message in (
        ({k: v for k, v in state.items() if k != key}, f"1 missing: {key}"),
        ({**state, "more.weight": torch.zeros(1)}, r"1 unexpected: more\.weight"),
        ({**state, key: torch.zeros(7)}, rf"1 misshapen: .*{key}.*7"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"(?s)model\.safetensors.*{message}"):
            load_transformers(dino)


def test_checksum_and_truncation(dino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = dino / "model.safetensors"
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_transformers(dino, sha256=right).frame_px == 32
    with pytest.raises(ValueError, match=f"its SHA-256 is {right}, expected {'1' * 64}"):
        load_encoder("transformers:x", weights=str(dino), sha256="1" * 64)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors.*truncated"):
        load_transformers(dino)


def test_files_that_are_not_there(dino: Path, clip_folder: Path) -> None:
    with pytest.raises(ValueError, match="'transformers:x' needs weights: a local folder"):
        load_encoder("transformers:x")
    with pytest.raises(ValueError, match="'transformers:x' needs weights"):
        encoder_spec("transformers:x")
    with pytest.raises(FileNotFoundError, match=r"No config\.json in .*nowhere"):
        encoder_spec("transformers:x", str(dino / "nowhere"))
    (dino / "preprocessor_config.json").rename(dino / "aside.json")
    with pytest.raises(FileNotFoundError, match=r"No preprocessor_config\.json"):
        load_transformers(dino)
    card = {"image_processor": json.loads((dino / "aside.json").read_text())}
    (dino / "processor_config.json").write_text(json.dumps(card))
    assert load_transformers(dino).mean == (0.5, 0.4, 0.3)
    (dino / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="No weights at"):
        load_transformers(dino)
    bare = dino / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (bare / name).symlink_to(clip_folder / name)
    with pytest.raises(FileNotFoundError, match="reads text, and no tokenizer"):
        load_transformers(bare)


def test_preprocessing_that_is_not_the_usual_is_refused(dino: Path) -> None:
    for settings, message in (
        ({"rescale_factor": 1.0}, r"does not scale pixels to 0\.\.1"),
        ({"size": {"height": 32, "width": 48}}, "32 x 48 px, and frames are square"),
    ):
        write_preprocessing(dino, 32, **settings)
        with pytest.raises(ValueError, match=message):
            load_transformers(dino)
    card = json.loads((dino / "preprocessor_config.json").read_text())
    (dino / "preprocessor_config.json").write_text(json.dumps({"size": 32, "image_std": card["image_std"]}))
    with pytest.raises(ValueError, match="names no image_mean and image_std"):
        load_transformers(dino)
    write_preprocessing(dino, 32, do_normalize=False)
    assert load_transformers(dino).std == (1.0, 1.0, 1.0)


def test_code_in_the_folder_is_never_run(dino: Path) -> None:
    card = json.loads((dino / "config.json").read_text())
    card |= {"model_type": "ours", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (dino / "config.json").write_text(json.dumps(card))
    (dino / "evil.py").write_text(f"open({str(dino / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="without running code from that folder"):
        load_transformers(dino)
    assert not (dino / "ran").exists()


def test_models_that_pool_nothing_are_refused(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(**VISION, image_size=32, patch_size=8)
    save_model(config, tmp_path, 32)
    encoder = load_encoder("transformers:mae", weights=str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="pools no features"):
        encoder.encode_frames(frames_of(32))
