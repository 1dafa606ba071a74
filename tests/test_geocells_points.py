"""Positions from the files that people have: separators, headers, names, missing values, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hedwig.geocells.points import read_points


@pytest.mark.parametrize(
    "text",
    [
        "48.5,9.25\n-54.8, -68.5\n",
        "48.5 9.25\n-54.8\t-68.5\n",
        "48.5\t9.25\n-54.8\t-68.5\n",
        "lat,lon\n48.5,9.25\n-54.8,-68.5\n",
        "\ufeffid;Longitude;Latitude\na;9.25;48.5\nb;-68.5;-54.8\n",
        "name lng latitude\na 9.25 48.5\nb -68.5 -54.8\n",
        "48.5,9.25,Germany\n-54.8,-68.5,Argentina\n",
    ],
)
def test_forms_of_text(tmp_path, text):
    (tmp_path / "points.csv").write_text(text)
    lat, lon, num_left_out = read_points(str(tmp_path / "points.csv"))
    assert lat.tolist() == [48.5, -54.8]
    assert lon.tolist() == [9.25, -68.5]
    assert num_left_out == 0


def test_parquet_and_rows_without_a_position(tmp_path):
    table = pd.DataFrame({"pano_id": ["a", "b", "c"], "lat": [1.0, np.nan, 3.0], "lon": [4.0, 5.0, 6.0]})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.parquet", "a.csv"):
        lat, lon, num_left_out = read_points(str(tmp_path / name))
        assert (lat.tolist(), lon.tolist(), num_left_out) == ([1, 3], [4, 6], 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", r"no columns lat and lon; it has \['a', 'b'\]"),
        ("1\n2\n", "one column"),
        ("lat,lon\nx,2\n", "cannot be read as positions"),
        ("lat,lon\n,\n", "no position in any"),
        ("120.5,48\n", r"1 of 1 rows of .* first lat=120\.5, lon=48\.0; latitude comes first"),
        ("", "empty"),
    ],
)
def test_what_is_refused(tmp_path, text, words):
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_points(str(tmp_path / "points.csv"))
    with pytest.raises(FileNotFoundError, match="No points at"):
        read_points(str(tmp_path / "none.csv"))
