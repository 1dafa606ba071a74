"""Reader tables go through the same checks as a user's listing; nothing is guessed on the way."""

from __future__ import annotations

import numpy as np
import pytest

from hedwig.schema import SchemaError
from hedwig.sources import check_listing, read_listing
from hedwig.sources.readers import LISTING, images_by_name, listing_frame, listing_table, read_csv


def test_texts_that_are_no_numbers_are_rejected_with_their_text():
    table = listing_table(
        {"pano_id": ["a", "b", "c", "d"], "lat": ["1.5", "north", "", None], "lon": [2, "3", float("nan"), ""],
         "image_uri": ["a.jpg", "b.jpg", "c.jpg", ""]},
        4,
    )  # fmt: skip
    assert table.schema.equals(LISTING)
    checked = check_listing(listing_frame(table), image_root="/data")
    assert checked.panoramas["pano_id"].to_pylist() == ["a", "c"]
    assert checked.panoramas["lat"].to_pylist() == [1.5, None]
    assert checked.panoramas["split"].to_pylist() == ["train", "query"]
    assert checked.rejected["reason"].to_pylist() == ["lat is not a number: 'north'", "no image_uri"]


def test_the_frame_is_that_of_read_listing(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("pano_id,lat,lon,heading,image_uri\na,1,2,90,x.jpg\nb,,,,y.jpg\n")
    expected = read_listing(str(path))
    table = listing_table(
        {"pano_id": ["a", "b"], "lat": ["1", ""], "lon": ["2", ""], "heading": ["90", ""],
         "image_uri": ["x.jpg", "y.jpg"]}, 2,
    )  # fmt: skip
    found = listing_frame(table)
    for name in expected.columns:
        assert [None if v != v else v for v in found[name]] == [None if v != v else v for v in expected[name]], name
    assert found["lat"].dtype == np.float64
    assert found["country"].tolist() == [None, None]  # not NaN


def test_csv_columns_by_name_whatever_their_case(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("IMG_ID, Lat ,country\n1,2,NA\n")
    assert read_csv(str(path), ("img_id", "lat"), ("country", "lon")) == {
        "img_id": ["1"], "lat": ["2"], "country": ["NA"], "lon": [""],
    }  # fmt: skip
    with pytest.raises(SchemaError, match=r"lacks the column\(s\) id; it has"):
        read_csv(str(path), ("id",))
    with pytest.raises(FileNotFoundError):
        read_csv(str(tmp_path), ("id",))


def test_images_are_found_by_name_in_any_subfolder(tmp_path):
    for name in ("00/a.jpg", "01/b.PNG", "01/a.jpg", "01/c.txt", ".hidden/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert images_by_name(str(tmp_path)) == {"a": str(tmp_path / "00/a.jpg"), "b": str(tmp_path / "01/b.PNG")}


def test_wrong_columns_are_bugs_that_speak():
    with pytest.raises(ValueError, match="no column latitude"):
        listing_table({"latitude": [1]}, 1)
    with pytest.raises(ValueError, match=r"other lengths: \{'pano_id': 2"):
        listing_table({"pano_id": ["a", "b"]}, 1)
