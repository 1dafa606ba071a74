"""Each loss against a slow twin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hedwig import geo
from hedwig.losses import (
    cross_entropy,
    haversine_km,
    haversine_smoothing_loss,
    haversine_targets,
    video_text_loss,
)

CELL_LAT = torch.tensor([38.7, 41.2, -33.9, 60.2, 0.0])
CELL_LON = torch.tensor([-9.1, -8.6, 151.2, 24.9, 179.9])
LAT, LON = torch.tensor([38.9, -33.0, 0.1, 40.0]), torch.tensor([-9.0, 151.0, -179.9, -8.0])
CELL_IDS = torch.tensor([0, 2, 4, 0])


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def test_cross_entropy(logits: torch.Tensor) -> None:
    rows = logits.tolist()
    slow = [math.log(sum(math.exp(x) for x in row)) - row[i] for row, i in zip(rows, CELL_IDS.tolist(), strict=True)]
    assert cross_entropy(logits, CELL_IDS).item() == pytest.approx(sum(slow) / 4, abs=1e-5)


def test_haversine_is_geos() -> None:
    rng = np.random.default_rng(0)
    lat1, lat2 = rng.uniform(-90, 90, (2, 500))
    lon1, lon2 = rng.uniform(-180, 180, (2, 500))
    lat1[:4], lon1[:4], lat2[:4], lon2[:4] = [0, 90, 10, 5], [0, 0, 20, 179.9], [0, -90, 10, 5], [180, 0, 20, -179.9]
    ours = haversine_km(*(torch.from_numpy(a) for a in (lat1, lon1, lat2, lon2)))
    np.testing.assert_allclose(ours.numpy(), geo.haversine_km(lat1, lon1, lat2, lon2), rtol=1e-12, atol=1e-9)
    assert ours[2] == 0


@pytest.mark.parametrize("tau_km", [75.0, 400.0])
def test_published_targets(tau_km: float) -> None:
    targets = haversine_targets(CELL_LAT, CELL_LON, LAT, LON, CELL_IDS, tau_km=tau_km, normalised=False)
    nearest = haversine_targets(CELL_LAT, CELL_LON, LAT, LON, None, tau_km=tau_km, normalised=False)
    assert targets.dtype == torch.float32
    for n in range(4):
        d = [float(geo.haversine_km(LAT[n], LON[n], CELL_LAT[i], CELL_LON[i])) for i in range(5)]
        true = int(CELL_IDS[n])
        for i in range(5):
            assert targets[n, i].item() == pytest.approx(math.exp(-(d[i] - d[true]) / tau_km), rel=1e-4, abs=1e-30)
            assert nearest[n, i].item() == pytest.approx(math.exp(-(d[i] - min(d)) / tau_km), rel=1e-4, abs=1e-30)
    assert targets[3, 1] > 1  # its true cell is not the nearest one
    assert nearest.max() == 1


def test_normalised_targets() -> None:
    targets = haversine_targets(CELL_LAT, CELL_LON, LAT, LON, CELL_IDS, tau_km=200.0, normalised=True)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    for n in range(4):
        weights = [math.exp(-float(geo.haversine_km(LAT[n], LON[n], CELL_LAT[i], CELL_LON[i])) / 200) for i in range(5)]
        for i in range(5):
            assert targets[n, i].item() == pytest.approx(weights[i] / sum(weights), rel=1e-4, abs=1e-12)
    assert targets[2].argmax() == 4  # across the antimeridian


def test_normalised_targets_survive_far_cells() -> None:
    far = haversine_targets(
        CELL_LAT, CELL_LON, torch.tensor([-60.0]), torch.tensor([-60.0]), None, tau_km=1.0, normalised=True
    )
    assert far.sum().item() == pytest.approx(1)


def test_smoothing_loss(logits: torch.Tensor) -> None:
    targets = haversine_targets(CELL_LAT, CELL_LON, LAT, LON, CELL_IDS, tau_km=300.0, normalised=False)
    slow = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(x) for x in row))
        slow -= sum(y * (x - log_sum) for x, y in zip(row, target, strict=True)) / 4
    assert haversine_smoothing_loss(logits, targets).item() == pytest.approx(slow, rel=1e-5)


def test_smoothing_loss_tends_to_cross_entropy_for_small_tau(logits: torch.Tensor) -> None:
    targets = haversine_targets(CELL_LAT, CELL_LON, CELL_LAT[:4], CELL_LON[:4], None, tau_km=1e-3, normalised=True)
    assert haversine_smoothing_loss(logits, targets).item() == pytest.approx(
        cross_entropy(logits, torch.arange(4)).item(), rel=1e-6
    )


def test_video_text_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    video, text = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    slow = 0.0
    for i in range(4):
        for a, b in ((video, text), (text, video)):
            scores = [F.cosine_similarity(a[i], b[j], dim=0).item() / 0.07 for j in range(4)]
            slow += (math.log(sum(math.exp(s) for s in scores)) - scores[i]) / 8
    assert video_text_loss(video, text, 0.07).item() == pytest.approx(slow, rel=1e-5)
    assert video_text_loss(5 * video, text, 0.07).item() == pytest.approx(slow, rel=1e-5)
    assert video_text_loss(video, video, 0.01).item() < 1e-3


def test_temperature_can_be_learned() -> None:
    temperature = torch.tensor(0.1, requires_grad=True)
    video = torch.eye(3)
    video_text_loss(video, video.roll(1, 0), temperature).backward()
    assert temperature.grad is not None
    assert temperature.grad < 0  # all wrong, so warmer is better


def test_mistakes_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"tau_km must be positive, got 0\.0"):
        haversine_targets(CELL_LAT, CELL_LON, LAT, LON, CELL_IDS, tau_km=0.0, normalised=True)
    with pytest.raises(ValueError, match="differ in shape"):
        haversine_smoothing_loss(logits, logits[:, :3])
    with pytest.raises(ValueError, match="differ in shape"):
        video_text_loss(torch.zeros(2, 3), torch.zeros(3, 3), 0.1)
