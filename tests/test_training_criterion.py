"""Which loss a setting means, where the coarser levels come from, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from hedwig.geo import haversine_km
from hedwig.geocells import Geocells
from hedwig.geocells.hierarchy import Level
from hedwig.training.criterion import Criterion, check_losses, parents_of
from hedwig.training.rows import Batch, Plan

CELL_LAT, CELL_LON = np.array([0.0, 0.0, 10.0, 40.0]), np.array([0.0, 1.0, 0.0, 90.0])
SETTINGS = {"tau_km": 75.0, "hierarchy_weights": [], "contrastive_weight": 0.5, "near_km": 50.0, "far_km": 500.0}


def criterion(parents: tuple = (), **settings) -> Criterion:
    plan = Plan("", "image", None, 2, 0, pa.table({}), CELL_LAT, CELL_LON, parents=parents)
    return Criterion({**SETTINGS, **settings}, plan, torch.device("cpu"))


@pytest.fixture
def batch() -> Batch:
    lat, lon = torch.tensor([0.1, 9.0, 39.0], dtype=torch.float64), torch.tensor([0.2, 0.0, 91.0], dtype=torch.float64)
    return Batch(torch.zeros(3, 2), None, torch.tensor([0, 2, 3]), lat, lon)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_each_name_is_its_loss(batch, logits):
    log_p = logits.log_softmax(dim=1).tolist()
    probs = logits.softmax(dim=1)
    true = batch.cell_ids.tolist()
    slow = dict.fromkeys(("ce", "haversine", "haversine_raw"), 0.0)
    for b in range(3):
        d = [float(haversine_km(batch.lat[b], batch.lon[b], CELL_LAT[i], CELL_LON[i])) for i in range(4)]
        raw = [math.exp(-(x - d[true[b]]) / 75) for x in d]
        slow["ce"] -= log_p[b][true[b]] / 3
        slow["haversine_raw"] -= sum(y * x for y, x in zip(raw, log_p[b], strict=True)) / 3
        slow["haversine"] -= sum(y / sum(raw) * x for y, x in zip(raw, log_p[b], strict=True)) / 3
    slow["mse"] = float(((probs - F.one_hot(batch.cell_ids, 4)) ** 2).sum(dim=1).mean())
    for loss, value in slow.items():
        assert criterion(loss=loss).cells(logits, batch).item() == pytest.approx(value, rel=1e-5), loss


def test_levels_are_added_by_their_weights(batch, logits):
    parents = (np.array([0, 0, 0, 1]), np.array([0, 0, 1, 2]))
    probs = logits.softmax(dim=1)
    coarse = -(probs[0, :3].sum().log() + probs[1, :3].sum().log() + probs[2, 3].log()) / 3
    fine = -(probs[0, :2].sum().log() + probs[1, 2].log() + probs[2, 3].log()) / 3
    got = criterion(parents, loss="ce", hierarchy_weights=[0.5, 2.0]).cells(logits, batch)
    assert got.item() == pytest.approx((F.cross_entropy(logits, batch.cell_ids) + 0.5 * coarse + 2 * fine).item())


def test_pairs_are_weighted(batch):
    near = Batch(batch.image, None, batch.cell_ids, torch.tensor([0.0, 0.1, 39.0]), torch.tensor([0.0, 0.1, 91.0]))
    vectors = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    loss, num_near = criterion().pairs(vectors, near)
    rows = [math.log(math.exp(8) + math.exp(0)) - 8, math.log(math.exp(8) + math.exp(6)) - 8]
    assert loss.item() == pytest.approx(0.5 * sum(rows) / 2, rel=1e-4)
    assert int(num_near) == 2


def test_parents_come_from_the_hierarchy_coarsest_first():
    cells = Geocells.from_membership([0, 1, 40, 41, -30, 60], [0, 1, 90, 91, 20, -100], [0, 0, 1, 2, 3, 4], levels=3)
    levels = cells.hierarchy()
    for num in (0, 1, 2):
        parents = parents_of(cells, num)
        assert len(parents) == num
        for parent, level in zip(parents, levels, strict=False):
            assert parent.tolist() == level.parent.tolist()
    with pytest.raises(ValueError, match="3 weights and the geocells have 2 coarser"):
        parents_of(cells, 3)


def test_cells_without_a_country_have_no_parent():
    names = SimpleNamespace(hierarchy=lambda: [Level.of("parent", ["FR", "", "DE", "FR"])])
    assert parents_of(names, 1)[0].tolist() == [2, -1, 1, 2]
    with pytest.raises(ValueError, match=r"column 'parent'; build the geocells with a geography"):
        parents_of(SimpleNamespace(hierarchy=lambda: [Level.of("parent", ["", ""])]), 1)
    plain = SimpleNamespace(table={"country": ["FR", "DE", "FR"]})
    assert parents_of(plain, 1)[0].tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="have 0 coarser level"):
        parents_of(SimpleNamespace(table={}), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "mae"}, "got 'mae'"),
        ({"hierarchy_weights": (1, 1, 1, 1)}, r"at most 3 numbers .* got \(1, 1, 1, 1\)"),
        ({"hierarchy_weights": (-1.0,)}, r"got \(-1.0,\)"),
        ({"contrastive_weight": -1.0}, "contrastive_weight must be at least 0, got -1.0"),
        ({"near_km": 300.0}, "near_km <= far_km, got 300.0 and 200.0"),
        ({"near_km": 0.0}, "got 0.0 and 200.0"),
    ],
)
def test_bad_settings_name_the_value(change, message):
    good = {"loss": "ce", "hierarchy_weights": (), "contrastive_weight": 0.0, "near_km": 25.0, "far_km": 200.0}
    check_losses(**good)
    with pytest.raises(ValueError, match=message):
        check_losses(**{**good, **change})
