"""The catalogue: its names, its pins, and which files of a repository it asks for."""

from __future__ import annotations

import re

import pytest

from hedwig.models.catalogue import CATALOGUE, released


def test_names_are_unique_and_pins_are_whole():
    assert len({model.name for model in CATALOGUE}) == len(CATALOGUE)
    for model in CATALOGUE:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.repo)
        assert model.revision is None or re.fullmatch(r"[0-9a-f]{40}", model.revision)
        assert model.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", model.sha256)
        assert model.sha256 is None or model.entry in model.files
        assert model.use


def test_what_is_unclear_or_restricted_is_said():
    for name in ("viclip-l14", "viclip-b16"):
        model = released(name)
        assert model.revision
        assert model.sha256
        assert "unclear" in model.licence
    assert "not for commercial use" in released("streetclip").licence
    assert released("viclip-l14-10m-flt-pth").sha256 is None
    assert released("internvl3-1b").licence is None


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'viclip-l14'"):
        released("viclip-l41")


@pytest.mark.parametrize(
    ("name", "path", "wanted"),
    [
        ("viclip-l14", "model.safetensors", True),
        ("viclip-l14", "viclip.py", False),
        ("viclip-l14", "sub/model.safetensors", False),
        ("siglip2-base", "config.json", True),
        ("siglip2-base", "onnx/config.json", False),
        ("internvideo2.5-8b", "modeling_internvl_chat_hico2.py", False),
        ("diffusion360", "sd-base/unet/diffusion_pytorch_model.bin", True),
        ("diffusion360", "sr-base/unet/config.json", False),
        ("diffusion360", "RealESRGAN_x2plus.pth", False),
    ],
)
def test_files_of_a_repository(name, path, wanted):
    assert released(name).wants(path) is wanted


def test_no_python_file_is_ever_wanted():
    for model in CATALOGUE:
        assert not model.wants("modeling.py")
        assert not model.wants("sd-base/modeling.py") or model.name == "diffusion360"
