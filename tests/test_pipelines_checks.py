"""Encoder settings that cannot end well are refused when the run is planned, with what to set instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hedwig.config import validate_experiment
from hedwig.models import encoder as models
from hedwig.pipelines import plan
from hedwig.pipelines.checks import sizes_of, weights_of


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_random", lambda *a: pytest.fail("a model was built"))
    monkeypatch.setattr(models, "_read", lambda *a: pytest.fail("weights were read"))


def planned(first: str | None = None, **settings: Any) -> list[str]:
    return plan(validate_experiment({"output": "runs/x", "data": {"panoramas": "x.csv"}, **settings}), first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": {"name": "viclip-tin"}}, "did you mean 'viclip-tiny'"),
        ({"encoder": {"name": "open_clip:ViT-B-33"}}, "open_clip knows no 'ViT-B-33'"),
        ({"encoder": {"name": "timm:no_such_net"}}, "timm knows no 'no_such_net'"),
        ({"encoder": {"name": "transformers:dino"}}, "needs weights"),
        ({"encoder": {"name": "clip-tiny", "fusion": "viclip"}}, "one frame at a time; set encoder.fusion=mean"),
        (
            {"encoder": {"name": "viclip-tiny", "fusion": "mean", "temporal": "interpolate"}},
            "no temporal embedding to interpolate; set encoder.temporal=select",
        ),
        (
            {"encoder": {"name": "viclip-tiny", "fusion": "max_sim"}, "index": {"embedding": "projected"}},
            "set index.embedding=image",
        ),
        ({"encoder": {"name": "timm:test_vit"}}, "test_vit reads no text; set training.use_text=false"),
        ({"encoder": {"name": "timm:test_vit", "train": {}}, "training": {"use_text": False}}, "cannot be trained"),
        ({"encoder": {"name": "viclip-tiny", "sha256": "0" * 64}}, "encoder.weights is not set"),
        (
            {"encoder": {"name": "viclip-tiny"}, "evaluate": {"baseline": {"name": "clip-tiny", "fusion": "max_sim"}}},
            "set evaluate.baseline.fusion=mean",
        ),
        (
            {"encoder": {"name": "viclip-tiny"}, "evaluate": {"baseline": {"name": "clip-tinny"}}},
            "did you mean 'clip-tiny'",
        ),
        (
            {
                "encoder": {"name": "viclip-tiny", "train": {}},
                "evaluate": {"baseline": {"name": "viclip-tiny", "fusion": "mean"}},
            },
            "trained twice",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**settings)


def test_weights_that_are_not_there_stop_the_stages_that_need_them(tmp_path: Path) -> None:
    missing = {"encoder": {"name": "viclip-tiny", "weights": str(tmp_path / "gone.safetensors")}}
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        planned(**missing)
    assert planned("index", **missing) == ["index", "predict", "evaluate"]
    fetched = validate_experiment({"output": "x", "encoder": {"name": "viclip-b16", "weights": "viclip-b16"}})
    with pytest.raises(FileNotFoundError, match="hedwig fetch viclip-b16"):
        weights_of(fetched.encoder)


def test_what_works_is_planned(caplog: pytest.LogCaptureFixture) -> None:
    for settings in (
        {"encoder": {"name": "viclip-tiny", "fusion": "max_sim"}, "index": {"embedding": "image"}},
        {"encoder": {"name": "viclip-tiny", "temporal": "interpolate"}, "slicing": {"num_frames": 10}},
        {"encoder": {"name": "clip-tiny", "fusion": "attention"}, "slicing": {"num_frames": 1}},
        {"encoder": {"name": "timm:test_vit"}, "training": {"use_text": False}},
    ):
        assert "embed" in planned(**settings)
    assert not caplog.records
    planned(encoder={"name": "viclip-tiny"}, captions={"source": "none"})
    assert "training.use_text=false" in caplog.text


def test_sizes_do_not_need_weights_that_are_not_there() -> None:
    x = validate_experiment({"output": "x", "encoder": {"name": "viclip-b16", "weights": "nowhere.pth"}})
    assert (sizes_of(x.encoder).frame_px, sizes_of(x.encoder).image_dim) == (224, 512)
