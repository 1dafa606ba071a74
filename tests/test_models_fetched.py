"""Looking up fetched models: where the cache is, what a setting's name means, and records that are damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hedwig.models.catalogue import released
from hedwig.models.fetched import (
    FetchedFile,
    adopt,
    cache_folder,
    check_pinned,
    find,
    model_folder,
    resolve_weights,
    write_source,
)

NAME = "clip-vit-l14"
FILE = "open_clip_model.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HEDWIG_CACHE", str(tmp_path))
    folder = model_folder(NAME)
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(b"weights")
    return folder


def test_the_cache_is_the_argument_then_the_variable_then_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HEDWIG_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "hedwig"
    monkeypatch.setenv("HEDWIG_CACHE", "/other")
    assert cache_folder() == Path("/other")
    assert cache_folder("~/mine") == tmp_path / "mine"


def test_only_names_of_the_catalogue_are_resolved(folder):
    for path in ("model.safetensors", str(folder), "s3://bucket/viclip-l14", "viclip-l41"):
        assert resolve_weights(path) == path
    with pytest.raises(FileNotFoundError, match=f"run: hedwig fetch {NAME}"):
        resolve_weights(NAME)


def test_a_copied_file_is_taken_with_its_digest_and_a_note_that_nothing_vouches_for_it(folder):
    adopted = adopt(NAME)
    digest = hashlib.sha256(b"weights").hexdigest()
    assert adopted.files == (FetchedFile(FILE, 7, digest, ""),)
    assert adopted.revision is None
    assert find(NAME) == adopted
    assert adopt(NAME) is None  # it is recorded already
    assert resolve_weights(NAME) == str(folder / FILE)
    (folder / FILE).write_bytes(b"weight")
    with pytest.raises(FileNotFoundError, match="has 6 bytes, 7 were fetched"):
        resolve_weights(NAME)


def test_a_record_of_an_unpinned_file_is_no_record_of_a_pinned_one(tmp_path):
    folder = model_folder("viclip-b16", tmp_path)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    file = FetchedFile("model.safetensors", 7, "0" * 64, "hub")
    write_source(released("viclip-b16"), folder, [file], None, None)
    assert "is pinned" in find("viclip-b16", cache=tmp_path).problems()[0]


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"name": NAME})])
def test_a_damaged_record_is_named(folder, text):
    (folder / "source.json").write_text(text)
    with pytest.raises(ValueError, match=r"source.json' is damaged"):
        find(NAME)


def copied(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_a_half_copied_folder_is_not_taken_for_a_model(tmp_path):
    """Of a model that the catalogue knows by patterns, its own files say what is missing."""
    folder = model_folder("siglip2-base", tmp_path)
    copied(folder, {"tokenizer.json": "{}"})
    assert adopt("siglip2-base", cache=tmp_path) is None
    copied(folder, {"config.json": '{"model_type": "sig'})
    assert adopt("siglip2-base", cache=tmp_path) is None
    copied(folder, {"config.json": "{}"})
    assert adopt("siglip2-base", cache=tmp_path) is None
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    copied(folder, {"model.safetensors.index.json": json.dumps(index)})
    save_file({"a": np.zeros(8, dtype=np.float32)}, folder / "model-1.safetensors")
    assert adopt("siglip2-base", cache=tmp_path) is None
    (folder / "model-2.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes()[:-4])
    assert adopt("siglip2-base", cache=tmp_path) is None
    assert not (folder / "source.json").exists()
    save_file({"b": np.zeros(8, dtype=np.float32)}, folder / "model-2.safetensors")
    adopted = adopt("siglip2-base", cache=tmp_path)
    assert len(adopted.files) == 5
    assert not adopted.problems()


def test_a_half_copied_pipeline_is_not_taken_for_a_model(tmp_path):
    folder = model_folder("diffusion360", tmp_path) / "sd-base"
    index = {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": True,
        "safety_checker": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    for name, content in (
        ("unet/diffusion_pytorch_model.bin", "weights"),
        ("model_index.json", json.dumps(index)),
        ("tokenizer/tokenizer_config.json", "{}"),
    ):
        copied(folder, {name: content})
        assert adopt("diffusion360", cache=tmp_path) is None
    copied(folder, {"unet/config.json": "{}"})
    assert len(adopt("diffusion360", cache=tmp_path).files) == 4


def test_the_pinned_digest_is_that_of_the_file_as_it_is():
    check_pinned("viclip-b16", released("viclip-b16").sha256)
    check_pinned(NAME, "0" * 64)  # nothing is pinned
    with pytest.raises(ValueError, match=f"have sha256 {'0' * 64}, but af9cfba8.* is pinned"):
        check_pinned("viclip-b16", "0" * 64)
