"""Leaks between splits against pairwise loops, on splits that leak on purpose and on one that does not."""

from __future__ import annotations

import json
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from hedwig.geo import haversine_km
from hedwig.schema import SchemaError
from hedwig.sources import random_split, spatial_split
from hedwig.sources.leaks import leak_report


def drive(num: int = 600, seed: int = 0) -> pd.DataFrame:
    """Panoramas of 30 drives, 20 to 50 m apart on each, anywhere on Earth."""
    rng = np.random.default_rng(seed)
    ride = np.arange(num) // 20
    lat0, lon0 = rng.uniform(-60, 70, num), rng.uniform(-180, 180, num)
    step = np.cumsum(rng.uniform(0.0002, 0.0005, num))
    lat = lat0[ride] + step - step[ride * 20]
    return pd.DataFrame(
        {
            "pano_id": [f"p{i:04d}" for i in range(num)],
            "lat": lat,
            "lon": lon0[ride],
            "sequence": [f"ride{r}" if r % 3 else None for r in ride],
            "split": "train",
        }
    )


def slow(rows: pd.DataFrame, near_km: float) -> tuple[set[int], set[int], float]:
    """Held-out rows with a training row nearby, and with one of their sequence; and the smallest distance."""
    near, same, least = set(), set(), np.inf
    train = rows[rows.split == "train"]
    for i, row in enumerate(rows.itertuples()):
        if row.split not in ("val", "test"):
            continue
        if np.isfinite(row.lat):
            km = haversine_km(row.lat, row.lon, train.lat, train.lon)
            least = min(least, np.nanmin(km))
            near |= {i} if np.nanmin(km) < near_km else set()
        same |= {i} if isinstance(row.sequence, str) and (train.sequence == row.sequence).any() else set()
    return near, same, float(least)


def test_a_random_split_leaks_as_the_loop_counts_and_is_warned_of() -> None:
    rows = drive()
    rows["split"] = random_split(rows["pano_id"].tolist(), val_fraction=0.1, test_fraction=0.2, seed=1)
    rows.loc[5, ["lat", "lon"]] = np.nan
    found = leak_report(pa.Table.from_pandas(rows, preserve_index=False), method="random")
    near, same, least = slow(rows, 0.1)
    assert found["near"]["num_held_out"] == len(near) > 100
    assert found["same_sequence"]["num_held_out"] == len(same) > 80
    assert found["num_leaking"] == len(near | same)
    assert found["num_held_out"] == (rows.split != "train").sum()
    assert found["near"]["min_km"] == pytest.approx(least)
    held, other, km = found["near"]["examples"][0]
    pair = rows.set_index("pano_id").loc[[held, other]]
    assert pair["split"].tolist()[1] == "train"
    assert pair["split"].tolist()[0] in ("val", "test")
    assert km == pytest.approx(
        float(haversine_km(*pair.iloc[0][["lat", "lon"]], *pair.iloc[1][["lat", "lon"]])), abs=1e-6
    )
    assert found["sentence"].startswith(f"LEAK: {found['num_leaking']:,} of {found['num_held_out']:,} held-out")
    assert "WARNING: the split is random by row" in found["sentence"]
    assert not found["clean"]
    assert found["same_picture"] is None
    json.dumps(found)


def test_a_spatial_split_is_clean_but_a_random_one_never_is() -> None:
    rows = drive()
    lat, lon = rows["lat"].to_numpy(), rows["lon"].to_numpy()
    rows["split"] = spatial_split(
        lat, lon, rows["sequence"].tolist(),
        block_km=50, buffer_km=1, val_fraction=0.1, test_fraction=0.2, seed=1,
    )  # fmt: skip
    found = leak_report(rows, method="spatial")
    assert found["num_held_out"] > 50
    assert found["clean"]
    assert found["sentence"].startswith("No leak found")
    assert found["near"]["min_km"] >= 1
    assert not leak_report(rows, method="random")["clean"]
    assert "WARNING" in leak_report(rows, method="random")["sentence"]


def test_buffer_and_query_rows_do_not_count_and_near_is_strict() -> None:
    rows = pd.DataFrame(
        {
            "pano_id": ["a", "b", "c", "d", "a"],
            "lat": [0.0, 0.0, 0.0, 0.0, 9.0],
            "lon": [0.0, 0.0005, 0.0005, 0.0, 9.0],
            "split": ["train", "buffer", "query", "test", "val"],
        }
    )
    found = leak_report(rows)
    assert found["num_held_out"] == 2
    assert found["near"]["examples"] == [["d", "a", 0.0]]
    assert found["same_id"]["examples"] == [["a", "a", "a"]]
    assert found["same_sequence"]["num_held_out"] == 0
    apart = float(haversine_km(0, 0, 0, 0.0005))
    two = rows.iloc[[0, 1]].assign(split=["train", "test"])
    assert leak_report(two, near_km=apart * 0.999)["near"]["num_held_out"] == 0
    assert leak_report(two, near_km=apart * 1.001)["near"]["num_held_out"] == 1


def test_places_on_both_sides_of_the_date_line_are_near() -> None:
    rows = pd.DataFrame(
        {"pano_id": ["a", "b"], "lat": [-17.0, -17.0], "lon": [179.9999, -179.9999], "split": ["train", "test"]}
    )
    assert leak_report(rows)["near"]["num_held_out"] == 1


def test_pictures_against_every_pair() -> None:
    rng = np.random.default_rng(4)
    num = 300
    hashes = rng.integers(1, 2**63, num, dtype=np.uint64)
    for i in range(160):  # copies with up to 10 bits changed, some of them exact and repeated
        source, flips = rng.integers(0, num), rng.permutation(64)[: i % 11]
        hashes[rng.integers(0, num)] = hashes[source] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0)
        )
    hashes[:6] = 0  # no picture
    split = rng.choice(["train", "test", "buffer"], num)
    rows = pd.DataFrame(
        {"pano_id": [f"p{i:03d}" for i in range(num)], "lat": rng.uniform(-80, 80, num), "lon": 0.0, "split": split}
    )
    found = leak_report(rows, hashes, near_km=1e-6)
    train = [i for i in range(num) if split[i] == "train" and hashes[i]]
    least = {
        i: min(int(np.bitwise_count(hashes[i] ^ hashes[j])) for j in train)
        for i in range(num)
        if split[i] == "test" and hashes[i]
    }
    expected = {i: bits for i, bits in least.items() if bits <= 8}
    assert found["same_picture"]["num_held_out"] == len(expected) > 5
    for held, other, bits in found["same_picture"]["examples"]:
        assert bits == expected[int(held[1:])] == np.bitwise_count(hashes[int(held[1:])] ^ hashes[int(other[1:])])
        assert split[int(other[1:])] == "train"
    assert "show the same picture" in found["sentence"]


def test_nothing_to_compare_and_wrong_input() -> None:
    rows = drive(40)
    assert leak_report(rows)["sentence"].startswith("There is no held-out split")
    assert leak_report(rows)["near"]["min_km"] is None
    with pytest.raises(SchemaError, match="split"):
        leak_report(rows.drop(columns="split"))
    with pytest.raises(ValueError, match="one uint64 per row"):
        leak_report(rows, np.zeros(3, dtype=np.uint64))


def test_a_hundred_thousand_rows_are_quick() -> None:
    rng = np.random.default_rng(0)
    num = 100_000
    rows = pd.DataFrame(
        {
            "pano_id": np.arange(num).astype(str),
            "lat": rng.uniform(-60, 70, num),
            "lon": rng.uniform(-180, 180, num),
            "sequence": (np.arange(num) // 30).astype(str),
            "split": np.where(rng.uniform(size=num) < 0.2, "test", "train"),
        }
    )
    began = time.process_time()
    assert leak_report(rows)["same_sequence"]["share"] > 0.99
    assert time.process_time() - began < 5  # a loop over pairs would take hours; measured 0.2 s
