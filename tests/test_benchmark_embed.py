"""FLOP counts against published ones and against a count by hand; the figures of a measurement against each other."""

from __future__ import annotations

import pytest
import torch

from hedwig.benchmark import embed
from hedwig.benchmark.embed import flop_per_caption, flop_per_clip, measure_embedding
from hedwig.models.clip import tiny_clip
from hedwig.models.viclip import B16, L14, TINY, ViCLIP, ViCLIPConfig


def on_meta(config: ViCLIPConfig) -> ViCLIP:
    with torch.device("meta"):
        return ViCLIP(config)


def by_hand(config: ViCLIPConfig, *, full: bool) -> int:
    """2 FLOP per multiplication and addition of every matrix product of the vision tower."""
    width, patches = config.vision_width, config.num_frames * (config.frame_px // config.patch_px) ** 2
    tokens = patches + 1
    embedding = 2 * patches * 3 * config.patch_px**2 * width
    products = 2 * tokens * 12 * width**2  # query, key, value, out: 4; MLP: 8
    attention = 2 * 2 * tokens**2 * width
    last = products + attention if full else 2 * width**2 * (2 * tokens + 10) + 2 * 2 * tokens * width
    return embedding + (config.vision_layers - 1) * (products + attention) + last + 2 * width * config.embed_dim


@pytest.mark.parametrize(("config", "video_gflop", "text_gflop"), [(L14, 1652.7, 5.5), (B16, 359.1, 2.4)])
def test_the_official_sizes_need_what_is_published(config, video_gflop, text_gflop):
    module = on_meta(config)
    assert flop_per_clip(module, 8, 224, full=True) / 1e9 == pytest.approx(video_gflop, abs=0.05)
    assert flop_per_caption(module) / 1e9 == pytest.approx(text_gflop, abs=0.05)


@pytest.mark.parametrize("config", [L14, B16, TINY])
@pytest.mark.parametrize("full", [True, False])
def test_counts_equal_a_count_by_hand(config, full):
    counted = flop_per_clip(on_meta(config), config.num_frames, config.frame_px, full=full)
    assert counted == pytest.approx(by_hand(config, full=full), rel=1e-4)


def test_counting_leaves_the_module_as_it_was():
    module = tiny_clip(0)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert flop_per_clip(module, 8, TINY.frame_px) > 1e6
    assert flop_per_clip(module, 8, TINY.frame_px) == 2 * flop_per_clip(module, 4, TINY.frame_px)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert {value.device.type for value in module.state_dict().values()} == {"cpu"}


def test_what_cannot_be_counted_is_none():
    assert flop_per_clip(torch.nn.Linear(2, 2), 8, 64) is None
    assert flop_per_caption(torch.nn.Linear(2, 2)) is None


def test_figures_of_a_measurement_fit_together(monkeypatch):
    monkeypatch.setattr(embed, "CPU_SIDE", 256)
    figures = measure_embedding("viclip-tiny", device="cpu", batch_size=2, seconds=0)
    assert figures.num_batches >= 2
    assert figures.best_clips_per_s >= figures.clips_per_s > 0
    assert figures.achieved_flop_per_s == pytest.approx(figures.clips_per_s * figures.flop_per_clip)
    assert figures.ratio_to_ceiling == pytest.approx(figures.achieved_flop_per_s / figures.ceiling_flop_per_s)
    assert figures.flop_per_clip < figures.full_flop_per_clip
    assert figures.peak_memory_bytes > 50 * 2**20
    assert figures.to_dict()["weights_note"] == "random weights (seed 0)"
    assert f"{figures.clips_per_s:.4g} clips/s (median of {figures.num_batches} batches of 2" in figures.text()


def test_the_ceiling_is_the_best_product_and_the_speed_the_median(monkeypatch):
    seconds = iter([3.0, 1.0, 2.0, 0.5, 4.0, 4.0, 4.0, 0.7, 1.0])
    monkeypatch.setattr(embed, "_seconds", lambda step, device: next(seconds))
    monkeypatch.setattr(embed, "CPU_SIDE", 8)
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(embed.time, "perf_counter", lambda: next(clock))
    figures = measure_embedding("viclip-tiny", device="cpu", batch_size=1, seconds=0)
    assert figures.ceiling_flop_per_s == 2 * 8**3 / 1.0
    assert figures.clips_per_s == pytest.approx(1 / 0.6)
    assert figures.num_batches == 2


@pytest.mark.gpu
def test_cuda_reaches_a_share_of_its_own_ceiling():
    figures = measure_embedding("viclip-b16", device="cuda", dtype="bfloat16", batch_size=8, seconds=2)
    assert 0.05 < figures.ratio_to_ceiling < 1
    assert figures.peak_memory_bytes > 2 * 149e6
