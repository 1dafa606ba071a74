import os
import subprocess
import sys
import time

import numpy as np
import pytest

from hedwig.benchmark.pipeline import Sample, StartClock, TimedEmbedder, TimedSlicer, figures_of, tree_cpu_s
from hedwig.benchmark.preprocessing import slice_figures
from hedwig.panorama import PanoramaSlicer, Slicing
from hedwig.synthetic.render import encode_jpeg


def test_figures_are_those_of_a_job_written_down_by_hand():
    """Three batches of 4: the second pass takes 2 s, the job 2.5 s a batch, Ray 40 ms CPU a row outside the stages."""
    ends = np.repeat([110.0, 114.5, 119.0], 4)
    clocks = {
        "began_s": ends - 4.4, "cut_s": ends - 4.0, "cut_cpu_s": np.full(12, 0.25),
        "ended_s": ends, "bare_s": np.full(12, 2.0), "used_cpu_s": np.full(12, 3.75),
    }  # fmt: skip
    used = (0.0, 20.0, 20.0 + 2 * 4.0 + 8 * 0.04, 99.0)
    memory = (300.0, 900.0, 950.0, 920.0)
    samples = [Sample(*one) for one in zip((100.0, 110.0, 119.0, 130.0), used, memory, strict=True)]
    figures = figures_of(clocks, samples, began_s=100.0, batch_size=4, model="m")
    assert figures.efficiency == pytest.approx(0.8)
    assert figures.panoramas_per_s == pytest.approx(8 / 5)
    assert figures.bare_panoramas_per_s == pytest.approx(2.0)
    assert figures.ray_cpu_ms_per_panorama == pytest.approx(40.0)
    assert figures.startup_s == pytest.approx(5.6)
    assert (figures.num_panoramas, figures.num_steady) == (12, 8)
    assert (figures.early_memory_mb, figures.peak_memory_mb) == (900.0, 950.0)
    assert figures.to_dict().keys() >= {"efficiency", "startup_s", "panoramas_per_s"}
    assert "efficiency 0.800" in figures.text()
    assert "40.00 ms" in figures.text()
    elsewhere = figures_of(clocks, (), began_s=100.0, batch_size=4, model="m")
    assert (elsewhere.ray_cpu_ms_per_panorama, elsewhere.peak_memory_mb) == (None, None)
    assert "Ray" not in elsewhere.text()
    with pytest.raises(ValueError, match="12 panoramas are 1 batch"):
        figures_of({k: v[:1].repeat(12) for k, v in clocks.items()}, samples, began_s=0, batch_size=4, model="m")


def test_decoding_apart_is_the_job_where_it_takes_longer_than_the_model():
    """Four blocks of 3 rows, cut in 7 s each while 3 batches of 4 are embedded; both passes take 2 s of 4.5 s."""
    ends = np.repeat([110.0, 114.5, 119.0], 4)
    cuts = np.repeat([107.0, 110.0, 115.5, 118.0], 3)
    clocks = {
        "began_s": cuts - np.repeat([7.0, 7.2, 6.8, 7.0], 3), "cut_s": cuts, "cut_cpu_s": np.full(12, 5.0),
        "ended_s": ends, "bare_s": np.full(12, 2.0), "used_cpu_s": np.full(12, 3.75),
    }  # fmt: skip
    inside = (115.5 - 110.0) / 6.8 + 1.0  # of the blocks' cutting, from the first batch's end to the last's
    used = (0.0, 20.0, 20.0 + 2 * 3.75 + inside * 5.0 + 8 * 0.04, 99.0)
    samples = [Sample(at, cpu, 900.0) for at, cpu in zip((100.0, 110.0, 119.0, 130.0), used, strict=True)]
    few, many = (
        figures_of(clocks, samples, began_s=90.0, batch_size=4, model="m", decode_workers=n) for n in (2, 8)
    )  # fmt: skip
    assert many.efficiency == pytest.approx(0.8)  # 28 s of cutting among 8 are no hindrance
    assert few.efficiency == pytest.approx(4.0 / (28.0 * 8 / 12 / 2))  # 8 of 12 rows, two at a time
    assert few.panoramas_per_s == pytest.approx(8 / (28.0 * 8 / 12 / 2))
    assert few.ray_cpu_ms_per_panorama == pytest.approx(40.0)
    assert few.decode_cpu_ms_per_panorama == pytest.approx(1000 * 20 / 12)
    assert "in 2 workers apart" in few.text()


def test_the_slicer_is_timed_and_cuts_as_ever():
    slicing = Slicing(num_frames=2, frame_px=32)
    image = encode_jpeg(np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8))
    batch = {
        "image_bytes": np.array([image, image], dtype=object), "heading": np.zeros(2), "bearing_deg": np.full(2, None),
        "projection": np.array(["equirectangular"] * 2, dtype=object), **StartClock()({"pano_id": np.arange(2)}),
    }  # fmt: skip
    out = TimedSlicer(slicing=slicing, num_threads=1)(batch)
    assert (out["frames"] == PanoramaSlicer(slicing=slicing)(batch)["frames"]).all()
    assert (out["cut_s"] >= batch["began_s"]).all()
    assert (out["cut_cpu_s"] > 0).all()


def test_the_embedder_is_timed_twice_and_answers_as_ever():
    stage = TimedEmbedder(encoder_name="viclip-tiny", batch_size=2, device="cpu")
    spec = stage._embedder.encoder
    batch = StartClock()({"pano_id": np.array(["a", "b"], dtype=object)})
    began = time.time()
    assert began - 5 < batch["began_s"][0] <= began
    frames = np.zeros((2, spec.num_frames, spec.frame_px, spec.frame_px, 3), np.uint8)
    out = stage({**batch, "frames": frames, "caption": np.array(["x", "y"], dtype=object)})
    assert np.allclose(np.linalg.norm(out["image_embedding"], axis=1), 1, atol=1e-5)
    assert out["bare_s"].shape == (2,)
    assert (out["bare_s"] > 0).all()
    assert (out["ended_s"] >= out["began_s"] + out["bare_s"]).all()
    assert (out["used_cpu_s"] > 0).all()


def test_the_cpu_of_children_is_counted():
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint('x', flush=True)\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        tree = tree_cpu_s(os.getpid())
        assert {pid for pid, _ in tree} >= {os.getpid(), child.pid}
        assert 0.25 < next(cpu for (pid, _), cpu in tree.items() if pid == child.pid) < 5
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_slicing_figures_have_their_public_names():
    figures = slice_figures(1, num_rounds=1)
    assert figures.keys() >= {"frames_per_s_per_core", "ratio_to_pillow", "mean_abs_diff"}
    assert figures["mean_abs_diff"] <= 0.02
    assert figures["max_inner_diff"] <= 1
    assert figures["preprocessing_ratio_to_open_clip"] > 0
