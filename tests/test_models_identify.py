"""What a file is told to be, with files of every architecture and with files that are wrong in one way each."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hedwig.models.encoder import load_encoder, save_encoder
from hedwig.models.geolocator import Geolocator, GeolocatorConfig
from hedwig.models.identify import identify
from hedwig.models.viclip import B16, TINY, ViCLIP, random_viclip, save_viclip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    file = tmp_path_factory.mktemp("tiny") / "model.safetensors"
    save_viclip(random_viclip(TINY, 0), file)
    return file


def test_a_viclip_loads_and_has_the_digests_of_its_model_id(tiny):
    identity = identify(tiny, name="viclip-tiny")
    assert identity.good
    assert identity.loads is True
    assert identity.architecture == "viclip-tiny"
    assert identity.num_keys == len(random_viclip(TINY, 0).state_dict())
    assert identity.dims == {"image_dim": 128, "num_frames": 8, "context": 32}
    assert identity.dtypes == {"float32": identity.num_keys}
    assert identity.sha256 == hashlib.sha256(tiny.read_bytes()).hexdigest()
    encoder = load_encoder("viclip-tiny", weights=str(tiny), device="cpu")
    assert encoder.model_id == f"viclip-tiny@{identity.tensors_sha256[:12]}"


def test_a_pth_is_the_same_model_as_its_safetensors(tiny, tmp_path):
    torch.save({"model": load_file(tiny)}, tmp_path / "model.pth")
    one, other = identify(tiny), identify(tmp_path / "model.pth")
    assert one.tensors_sha256 == other.tensors_sha256
    assert one.sha256 != other.sha256
    assert other.good


def test_wrong_keys_are_named(tiny, tmp_path):
    state = load_file(tiny)
    del state["temp"]
    state["extra"] = torch.zeros(2)
    state["text_encoder.positional_embedding"] = torch.zeros(77, TINY.text_width)
    save_file(state, tmp_path / "model.safetensors")
    identity = identify(tmp_path)
    assert not identity.good
    assert identity.loads is False
    assert identity.missing == ("temp",)
    assert identity.unexpected == ("extra",)
    assert identity.misshapen == (f"text_encoder.positional_embedding (77, {TINY.text_width}) instead of (32, 64)",)


def test_another_size_than_the_named_one_and_another_checksum_than_the_pinned_one(tiny, tmp_path, monkeypatch):
    identity = identify(tiny, name="viclip-l14")
    assert not identity.good
    assert identity.problem.startswith("it is viclip-tiny, not viclip-l14; its sha256 is not the pinned 07d32e92")
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in ViCLIP(B16).state_dict().items()}
    zeros = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    torch.save({key: value.half() for key, value in zeros.items()}, tmp_path / "b16.pth")  # a view of one number each
    monkeypatch.setattr("hedwig.models.identify.weights_digest", lambda state: "")  # of 600 MB of zeros
    identity = identify(tmp_path / "b16.pth", name="viclip-b16")
    assert identity.architecture == "viclip-b16"
    assert identity.num_keys == 303
    assert identity.num_parameters == 149_603_841
    assert identity.loads
    assert "not the pinned af9cfba8" in identity.problem


def test_a_viclip_of_another_size(tmp_path):
    config = dataclasses.replace(TINY, vision_width=64, vision_heads=2, embed_dim=32)
    save_viclip(random_viclip(config, 0), tmp_path / "model.safetensors")
    identity = identify(tmp_path)
    assert (identity.architecture, identity.loads, identity.dims["image_dim"]) == ("viclip", True, 32)


def test_open_clip_and_geolocator_and_unknown(tmp_path):
    encoder = load_encoder("clip-tiny", device="cpu")
    save_encoder(encoder.module, "clip-tiny", tmp_path / "clip", "note")
    identity = identify(tmp_path / "clip")
    assert (identity.architecture, identity.loads, identity.good) == ("open_clip", None, True)
    assert identity.dims == {"image_dim": 128, "context": 32}
    assert identity.tensors_sha256 == encoder.weights_digest
    Geolocator(GeolocatorConfig(16, 0, False, 8, 5)).save(tmp_path / "head")
    identity = identify(tmp_path / "head")
    assert (identity.architecture, identity.loads) == ("geolocator", True)
    assert identity.dims == {"num_cells": 5, "projection_dim": 8, "input_dim": 16}
    (tmp_path / "head" / "model.json").unlink()
    assert identify(tmp_path / "head").problem == "model.json is missing beside it"
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    identity = identify(tmp_path / "other.safetensors")
    assert not identity.good
    assert identity.architecture == "unknown"
    assert "weight" in identity.problem


def test_the_architecture_of_open_clip_is_compared_key_by_key(tmp_path, monkeypatch):
    import open_clip

    monkeypatch.setattr("hedwig.models.identify.weights_digest", lambda state: "")  # of 600 MB of zeros
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu"))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    del shapes["logit_scale"]
    state = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    torch.save(state, tmp_path / "b32.pt")
    identity = identify(tmp_path / "b32.pt")
    assert identity.architecture == "open_clip:ViT-B-32, activation not in the file"  # LAION's have the same keys
    assert identity.missing == ("logit_scale",)
    assert not identity.unexpected + identity.misshapen
    card = tmp_path / "open_clip_config.json"
    for quick_gelu, name in ((True, "ViT-B-32-quickgelu"), (False, "ViT-B-32")):
        card.write_text(json.dumps({"model_cfg": {"quick_gelu": quick_gelu}}))
        assert identify(tmp_path / "b32.pt").architecture == f"open_clip:{name}"
    card.unlink()
    torch.save({**state, "input_resolution": torch.tensor(224)}, tmp_path / "b32.pt")
    assert identify(tmp_path / "b32.pt").architecture == "open_clip:ViT-B-32-quickgelu"  # OpenAI's own archive


def test_a_folder_of_transformers_is_read_by_its_headers(tmp_path):
    config = {"model_type": "siglip", "vision_config": {"hidden_size": 8, "image_size": 32, "patch_size": 16}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert identify(tmp_path).problem == "it has no .safetensors file"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(())}, tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "c": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    identity = identify(tmp_path)
    assert identity.architecture == "transformers:siglip"
    assert (identity.num_keys, identity.num_parameters) == (2, 7)
    assert identity.dims == {"hidden_size": 8, "image_size": 32, "patch_size": 16}
    assert identity.problem == "model-2.safetensors missing"


def test_a_truncated_file_and_a_wrong_name_are_errors(tiny, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(tiny.read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated"):
        identify(tmp_path)
    with pytest.raises(ValueError, match="Cannot check for 'viclip'"):
        identify(tiny, name="viclip")
