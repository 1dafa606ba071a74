"""Published protocols as listings, on small tables in the layout that circulates, and the figures beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hedwig.sources import check_listing
from hedwig.sources.protocols import PROTOCOLS, PUBLISHED, read_protocol
from hedwig.sources.readers import listing_frame


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_im2gps3k_as_it_circulates(tmp_path: Path) -> None:
    (tmp_path / "im2gps3k_places365.csv").write_text(
        "IMG_ID,AUTHOR,LAT,LON,S3_Label\n1.2_3_a_9@N00.jpg,9@N00,48.5,2.25,0\n4_b.jpg,,-33.9,18.4,1\ngone.jpg,x,1,2,0\n"
    )
    touch(tmp_path, "images/1.2_3_a_9@N00.jpg", "images/4_b.jpg")
    table = read_protocol("im2gps3k", str(tmp_path))
    assert table["pano_id"].to_pylist() == ["1.2_3_a_9@N00", "4_b", "gone"]
    checked = check_listing(listing_frame(table), image_root="/")
    assert checked.panoramas["split"].to_pylist() == ["test", "test"]
    assert checked.panoramas["lat"].to_pylist() == [48.5, -33.9]
    assert checked.panoramas["projection"].to_pylist() == ["perspective"] * 2
    assert checked.panoramas["author"].to_pylist() == ["9@N00", None]
    assert checked.reasons == {"no image_uri": 1}


def test_yfcc4k_with_images_elsewhere_and_folders_in_the_ids(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("IMG_ID,LAT,LON\n6d/fa/6dfa1.jpg,1.5,2.5\n")
    touch(tmp_path, "pictures/deep/6dfa1.jpg")
    table = read_protocol("yfcc4k", str(tmp_path / "t.csv"), images=str(tmp_path / "pictures"))
    assert table["image_uri"].to_pylist() == [str(tmp_path / "pictures/deep/6dfa1.jpg")]
    assert table["pano_id"].to_pylist() == ["6d/fa/6dfa1"]


def test_a_rebuilt_gws15k_and_osv5m(tmp_path: Path) -> None:
    (tmp_path / "gws15k.csv").write_text("id,latitude,lng\np1,10,20\n")
    touch(tmp_path, "p1.jpg")
    row = read_protocol("gws15k", str(tmp_path)).to_pylist()[0]
    assert (row["lat"], row["lon"], row["split"], row["image_uri"]) == (10.0, 20.0, "test", str(tmp_path / "p1.jpg"))
    assert "Terms of Service" in row["licence"]
    (tmp_path / "test.csv").write_text("id,latitude,longitude,country\n7,1.5,2.5,SG\n")
    assert read_protocol("osv5m", str(tmp_path)).to_pylist()[0]["split"] == "test"


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'im2gps' is no protocol .* im2gps3k"):
        read_protocol("im2gps", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"yfcc4k_places365\.csv"):
        read_protocol("yfcc4k", str(tmp_path))
    (tmp_path / "t.csv").write_text("IMG_ID,LAT\na.jpg,1\n")
    with pytest.raises(ValueError, match="no filled column lon or lng or longitude"):
        read_protocol("im2gps3k", str(tmp_path / "t.csv"))


def test_published_figures_are_shares_that_grow_with_the_distance_and_have_a_source() -> None:
    assert set(PUBLISHED) == set(PROTOCOLS)
    for rows in PUBLISHED.values():
        assert len({row.method for row in rows}) == len(rows)
        for row in rows:
            known = [value for value in row.accuracy if value is not None]
            assert known == sorted(known)
            assert all(0 < value < 100 for value in known)
            assert row.source
            assert known or row.geoscore is not None
            assert row.geoscore is None or 0 < row.geoscore < 5000
