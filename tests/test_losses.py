"""Each loss against a slow twin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hedwig import geo
from hedwig.losses import (
    banded_contrastive_loss,
    cross_entropy,
    haversine_km,
    haversine_smoothing_loss,
    haversine_targets,
    hierarchical_cross_entropy,
    pairwise_km,
    parent_cross_entropy,
    squared_error,
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


def test_squared_error_is_the_brier_score(logits: torch.Tensor) -> None:
    slow = 0.0
    for row, true in zip(logits.tolist(), CELL_IDS.tolist(), strict=True):
        total = sum(math.exp(x) for x in row)
        slow += sum((math.exp(x) / total - (i == true)) ** 2 for i, x in enumerate(row)) / 4
    assert squared_error(logits, CELL_IDS).item() == pytest.approx(slow, rel=1e-5)
    sure = torch.tensor([[50.0, 0.0], [50.0, 0.0]])
    assert squared_error(sure, torch.tensor([0, 1])).item() == pytest.approx(1.0)  # right: 0, wrong: 2


PARENT = torch.tensor([0, 0, 1, 2, -1])


def slow_parent_loss(logits: torch.Tensor, cell_ids: list[int]) -> float:
    terms = []
    for row, true in zip(logits.double().tolist(), cell_ids, strict=True):
        if PARENT[true] >= 0:
            inside = sum(math.exp(x) for x, parent in zip(row, PARENT.tolist(), strict=True) if parent == PARENT[true])
            terms.append(-math.log(inside / sum(math.exp(x) for x in row)))
    return sum(terms) / max(1, len(terms))


def test_parents_are_as_probable_as_their_cells_together(logits: torch.Tensor) -> None:
    for cell_ids in ([0, 2, 4, 0], [1, 1, 3, 3], [4, 4, 4, 4]):
        got = parent_cross_entropy(logits, torch.tensor(cell_ids), PARENT).item()
        assert got == pytest.approx(slow_parent_loss(logits, cell_ids), abs=1e-6)
    cells = torch.arange(5)
    assert parent_cross_entropy(logits, CELL_IDS, cells).item() == pytest.approx(cross_entropy(logits, CELL_IDS).item())
    assert parent_cross_entropy(logits, CELL_IDS, torch.zeros(5, dtype=torch.int64)).item() == pytest.approx(
        0, abs=1e-6
    )
    # Neither a row without a parent nor hopeless logits spoil the gradient.
    far = (1000 * logits).requires_grad_()
    parent_cross_entropy(far, torch.tensor([4, 0, 1, 3]), PARENT).backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()
    assert (far.grad[0] == 0).all()
    assert (far.grad[1:].abs().sum(dim=1) > 0).any()


def test_hierarchy_is_the_weighted_sum_of_its_levels(logits: torch.Tensor) -> None:
    levels = [PARENT, torch.tensor([0, 0, 0, 1, 1])]
    each = [parent_cross_entropy(logits, CELL_IDS, parent).item() for parent in levels]
    got = hierarchical_cross_entropy(logits, CELL_IDS, levels, [0.5, 2.0]).item()
    assert got == pytest.approx(0.5 * each[0] + 2 * each[1], rel=1e-6)
    assert hierarchical_cross_entropy(logits, CELL_IDS, [], []).item() == 0
    with pytest.raises(ValueError, match="1 weights for 2 levels"):
        hierarchical_cross_entropy(logits, CELL_IDS, levels, [1.0])


def test_pairwise_distances_are_as_exact_as_stated() -> None:
    rng = np.random.default_rng(3)
    lat, lon = np.degrees(np.arcsin(rng.uniform(-1, 1, 400))), rng.uniform(-180, 180, 400)
    step, angle = 10 ** rng.uniform(-5, 2, 400), rng.uniform(0, 2 * np.pi, 400)  # from 1 m on
    lat2 = np.concatenate([(lat + step * np.cos(angle)).clip(-90, 90), lat, -lat])
    lon2 = np.concatenate([lon + step * np.sin(angle), lon, lon + 180])
    got = pairwise_km(*(torch.from_numpy(a) for a in (lat, lon, lat2, lon2)))
    assert got.dtype == torch.float32
    exact = geo.haversine_km(lat[:, None], lon[:, None], lat2[None], lon2[None])
    error = np.abs(got.double().numpy() - exact)
    assert error[exact < 1000].max() < 1e-3
    assert error[exact < 15_000].max() < 2e-2
    assert error.max() < 10
    assert (exact < 1).sum() > 400


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
    assert targets.sum(dim=1).tolist() == pytest.approx([1.0] * 4)
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


def slow_banded_loss(vectors: torch.Tensor, near_km: float, far_km: float) -> tuple[float, int]:
    terms = []
    for i in range(4):
        scores, positive, counted = {}, [], []
        for j in range(4):
            d = float(geo.haversine_km(LAT[i], LON[i], LAT[j], LON[j]))
            scores[j] = F.cosine_similarity(vectors[i], vectors[j], dim=0).item() / 0.1
            if i != j and d < near_km:
                positive.append(j)
            if i != j and (d < near_km or d > far_km):
                counted.append(j)
        if positive:
            log_sum = math.log(sum(math.exp(scores[a]) for a in counted))
            terms.append(-sum(scores[p] - log_sum for p in positive) / len(positive))
    return sum(terms) / max(1, len(terms)), len(terms)


@pytest.mark.parametrize("bands", [(200.0, 500.0), (200.0, 15_000.0), (18_000.0, 19_000.0), (1.0, 2.0)])
def test_banded_contrastive_loss(bands: tuple[float, float]) -> None:
    vectors = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    slow, num = slow_banded_loss(vectors.detach(), *bands)
    loss, num_anchors = banded_contrastive_loss(vectors, LAT, LON, near_km=bands[0], far_km=bands[1])
    assert loss.item() == pytest.approx(slow, rel=1e-4, abs=1e-6)
    assert int(num_anchors) == num
    assert num == {(200.0, 500.0): 2, (200.0, 15_000.0): 2, (18_000.0, 19_000.0): 4, (1.0, 2.0): 0}[bands]
    loss.backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()


def test_near_pairs_attract_and_far_ones_repel() -> None:
    lat, lon = torch.tensor([10.0, 10.01, -40.0, -40.01]), torch.tensor([5.0, 5.0, 100.0, 100.0])
    apart = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    good, bad = (banded_contrastive_loss(v, lat, lon, near_km=5, far_km=50)[0] for v in (apart, apart[[0, 2, 1, 3]]))
    assert good < 0.01
    assert bad > 5


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
    with pytest.raises(ValueError, match=r"got 50 and 5"):
        banded_contrastive_loss(logits, LAT, LON, near_km=50, far_km=5)
    with pytest.raises(ValueError, match="differ in shape"):
        haversine_smoothing_loss(logits, logits[:, :3])
    with pytest.raises(ValueError, match="differ in shape"):
        video_text_loss(torch.zeros(2, 3), torch.zeros(3, 3), 0.1)
