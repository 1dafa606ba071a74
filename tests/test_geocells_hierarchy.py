"""Levels above the cells: nested, named by country and admin-1 or by clusters, the same for the same cells."""

from __future__ import annotations

import numpy as np
import pytest

from hedwig.geo import unit_vectors
from hedwig.geocells import Geocells
from hedwig.geocells.geography import AdminTable
from hedwig.geocells.hierarchy import Level, parent_names


def nested(coarse, fine):
    return all(len(np.unique(coarse.parent[fine.parent == k])) == 1 for k in range(len(fine.names)))


def cells(num=200, known=True, levels=3):
    rng = np.random.default_rng(0)
    lat, lon = rng.uniform(-60, 60, num), rng.uniform(-180, 180, num)
    if not known:
        return Geocells.from_membership(lat, lon, np.arange(num), levels=levels)
    country = np.where(lon < 0, "AA", "BB").astype(object)
    admin1 = np.where(lat < 0, "south", "north").astype(object)
    table = AdminTable(country, admin1, country, np.zeros(num), np.linspace(0, 2, num))
    return Geocells.from_membership(lat, lon, np.arange(num), table, levels=levels)


def test_country_admin1_cell():
    made = cells()
    country, admin1 = made.hierarchy()
    assert country.names.tolist() == ["AA", "BB"]
    assert admin1.names.tolist() == ["AA/north", "AA/south", "BB/north", "BB/south"]
    assert (country.names[country.parent] == made.table["country"]).all()
    assert (made.table["lat"].to_numpy() < 0).tolist() == [n.endswith("south") for n in admin1.names[admin1.parent]]
    assert nested(country, admin1)
    assert made.table["parent"].equals(made.table["parent_1"].rename("parent"))
    assert made.table["off_polygon_km"].max() == 2.0


def test_two_and_four_levels():
    assert [level.column for level in cells(levels=2).hierarchy()] == ["parent_1"]
    country, admin1, cluster = cells(levels=4).hierarchy()
    assert nested(country, admin1)
    assert nested(admin1, cluster)
    assert 200 / 8 <= len(cluster.names) <= 40
    assert np.bincount(cluster.parent).max() <= 8
    with pytest.raises(ValueError, match="2 to 4 levels, not 5"):
        cells(levels=5)


def test_clusters_where_nothing_has_a_country():
    coarse, fine = cells(known=False).hierarchy()
    assert (len(coarse.names), len(fine.names)) == (8, 32)  # about 200^(1/3) and 200^(2/3)
    assert nested(coarse, fine)
    assert np.ptp(np.bincount(coarse.parent)) <= 1
    made = cells(known=False)
    vectors = unit_vectors(made.table["lat"], made.table["lon"])
    together = vectors[coarse.parent == 0] @ vectors[coarse.parent == 0].T
    assert together.mean() > 0.5  # the mean cosine over the globe is 0


def test_clusters_where_countries_have_no_admin1():
    names = parent_names(["AA"] * 100, [""] * 100, np.zeros(100), np.linspace(-90, 90, 100), 4)
    levels = [Level.of(f"parent_{i}", column) for i, column in enumerate(names)]
    assert [len(level.names) for level in levels] == [1, 2, 16]
    assert nested(levels[0], levels[1])
    assert nested(levels[1], levels[2])


def test_tables_saved_before_there_were_levels_and_those_that_are_not_nested():
    made = cells()
    old = Geocells(made.table.drop(columns=["parent_1", "parent_2", "off_polygon_km"]), made.anchors)
    assert [(level.column, len(level.names)) for level in old.hierarchy()] == [("parent", 2)]
    with pytest.raises(ValueError, match="parent_2 lies in several of parent_1"):
        Geocells(made.table.assign(parent_2="x"), made.anchors)
