"""The scripts in benchmarks/: what they cut, what they count, what they divide."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hedwig.panorama import Slicing, slice_panorama

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import compare_embedding
import dataloader
from compare_embedding import Cost, Turn, cost_of, measured, ratios_of


def test_the_script_cuts_the_frames_that_hedwig_cuts():
    y, x = np.mgrid[0:512, 0:1024]
    waves = [np.sin(2 * np.pi * x / 1024 * k) + np.cos(2 * np.pi * y / 512 * k) for k in (1, 3, 7)]
    image = (np.stack(waves, axis=-1) * 60 + 128).astype(np.uint8)
    frames = dataloader.cut_frames(Image.fromarray(image))
    ours = slice_panorama(image, Slicing(frame_px=64), projection="equirectangular")
    theirs = np.stack([np.asarray(f.resize((64, 64), Image.Resampling.BICUBIC)) for f in frames])
    assert {f.size for f in frames} == {(320, 320)}
    assert np.abs(ours.astype(int) - theirs).mean() < 1.5  # hedwig's windows are half a percent narrower
    assert np.abs(ours.astype(int) - np.roll(theirs, 1, axis=0)).mean() > 20


def test_cost_is_the_difference_and_the_rest_is_start():
    turns = [Turn(4, 12.0, 6.0), Turn(4, 14.0, 8.0), Turn(4, 13.0, 7.0), Turn(12, 17.0, 9.0)]
    cost = cost_of(turns)
    assert cost == Cost(500.0, 2.0, 4.0, 11.0, 12 / 17)
    with pytest.raises(ValueError, match="two sizes"):
        cost_of(turns[:3])


def test_ratios_say_how_much_less_hedwig_takes():
    def cost(ms, whole):
        return Cost(ms, 1000 / ms, 1.0, 0.0, whole)

    costs = {"hedwig": cost(100, 4.0), "dataloader": cost(150, 2.0), "frame_files": cost(50, 10.0)}
    ratios = ratios_of({**costs, "clip_retrieval": cost(300, 1.0), "dataloader_float32": cost(220, 1.0)})
    assert ratios["hedwig_vs_dataloader"] == pytest.approx(1.5)
    assert ratios["hedwig_vs_dataloader_with_start"] == pytest.approx(2.0)
    assert ratios["hedwig_vs_clip_retrieval"] == pytest.approx(3.5)
    assert ratios["hedwig_vs_clip_retrieval_with_start"] == pytest.approx((1 + 0.1) * 4)
    assert ratios["hedwig_vs_clip_retrieval_frames_given"] == pytest.approx(3.0)
    assert ratios["hedwig_vs_dataloader_float32"] == pytest.approx(2.2)
    assert "hedwig_vs_clip_retrieval" not in ratios_of(costs)
    assert ratios_of({}) == {}


def test_the_cpu_of_a_grandchild_counts_and_a_failure_is_shown():
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    turn = measured([sys.executable, "-c", nested], 3, {})
    assert turn.num == 3
    assert 0.4 <= turn.cpu_s < 10
    with pytest.raises(RuntimeError, match=r"ended with 1:\n(.|\n)*ZeroDivisionError"):
        measured([sys.executable, "-c", "1 / 0"], 1, {})


def test_agreement_sees_vectors_of_other_panoramas():
    rng = np.random.default_rng(0)
    vectors = {f"p{i}": v / np.linalg.norm(v) for i, v in enumerate(rng.standard_normal((5, 8)).astype(np.float32))}
    assert compare_embedding._agreement(vectors, vectors) == {"min_cosine": pytest.approx(1.0), "found_itself": 1.0}
    turned = {name: vectors[f"p{(i + 1) % 5}"] for i, name in enumerate(vectors)}
    assert compare_embedding._agreement(vectors, turned)["found_itself"] == 0.0
