"""Published data sets in their own layouts, on small copies of them and on the real files where these are."""

from __future__ import annotations

import pytest

from hedwig.sources import check_listing
from hedwig.sources.datasets import read_g3, read_global_streetscapes, read_kaggle, read_osv5m
from hedwig.sources.readers import listing_frame


def checked(table):
    return check_listing(listing_frame(table), image_root="/")


def test_osv5m_as_published(tmp_path):
    header = "id,latitude,longitude,thumb_original_url,country,sequence,captured_at,region,creator_username\n"
    (tmp_path / "train.csv").write_text(
        header + "3859149887465501,-43.804769384023,-176.61409250805,http://x,NZ,seqA,1421931600000,Chatham,roadroid\n"
        "17,10,,http://x,NA,seqB,,,\n"
        "18,10,20,http://x,NA,seqB,,,\n"
    )
    (tmp_path / "test.csv").write_text(header + "99,1.5,2.5,http://x,SG,s,2020-05-01,,me\n")
    for name in ("images/train/00/3859149887465501.jpg", "images/train/01/17.jpg", "images/test/00/99.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    table = read_osv5m(str(tmp_path))
    assert table["pano_id"].to_pylist() == ["3859149887465501", "17", "18", "99"]
    assert table["captured_at"].to_pylist() == ["2015-01-22T13:00:00Z", None, None, "2020-05-01"]
    assert table["author"].to_pylist() == ["roadroid", None, None, "me"]
    assert set(table["projection"].to_pylist()) == {"perspective"}
    result = checked(table)
    assert result.panoramas["split"].to_pylist() == ["train", "test"]
    assert result.panoramas["lon"].to_pylist() == [-176.61409250805, 2.5]
    assert result.panoramas["image_uri"].to_pylist()[0].endswith("images/train/00/3859149887465501.jpg")
    assert result.panoramas["licence"].to_pylist() == ["CC BY-SA 4.0"] * 2
    assert result.reasons == {"only one of lat and lon is given": 1, "no image_uri": 1}
    assert read_osv5m(str(tmp_path / "test.csv"))["pano_id"].to_pylist() == ["99"]
    with pytest.raises(FileNotFoundError, match=r"neither train\.csv nor test\.csv"):
        read_osv5m(str(tmp_path / "images"))


def test_global_streetscapes_as_published(shared):
    data = shared / "data"
    table = read_global_streetscapes(str(data / "global_streetscapes_metadata"), images=str(data / "mapillary_sample"))
    assert table.num_rows == 2319
    assert sum(p == "equirectangular" for p in table["projection"].to_pylist()) == 660
    first = table.slice(0, 1).to_pylist()[0]
    assert first["pano_id"] == "mapillary-1666317524185318"
    assert (first["lat"], first["lon"]) == (48.76894355452018, 9.1716206073761)
    assert first["heading"] == 29.87899474976217
    assert first["captured_at"] == "2024-07-09T03:24:18.913000+02:00"
    assert (first["country"], first["sequence"]) == ("DE", "aE5o7bTMH0UtscOYxhVwID")
    result = checked(table)
    assert (result.panoramas.num_rows, result.reasons) == (25, {"no image_uri": 2294})
    sources = set(table["source"].to_pylist())
    assert sources == {"Mapillary via Global Streetscapes", "KartaView via Global Streetscapes"}
    # The same images, as listed by hand beside them.
    rows = {row["pano_id"]: row for row in result.panoramas.to_pylist()}
    lines = (data / "real_images.csv").read_text().splitlines()[1:]
    by_hand = [line.split(",") for line in lines if line.startswith("mapillary-")]
    assert len(by_hand) == 25
    for pano_id, lat, lon, heading, projection, country, *_ in by_hand:
        row = rows[pano_id]
        assert row["lat"] == pytest.approx(float(lat), abs=1e-3)
        assert row["lon"] == pytest.approx(float(lon), abs=1e-3)
        assert row["heading"] == pytest.approx(float(heading), abs=6)  # corrected later by Mapillary
        assert (row["projection"], row["country"]) == (projection, country)


def test_g3_names_panoramas_by_their_pieces(tmp_path):
    ids = ["YYcmZ_mdbshez6STxSxmRQ", "_-0123456789abcdefghij"]
    names = [f"{pano_id}_{piece}.png" for pano_id in ids for piece in range(4)]
    (tmp_path / "val.csv").write_text("IMG_ID\n" + "\n".join(names) + "\n")
    (tmp_path / "panos").mkdir()
    (tmp_path / "panos" / f"{ids[1]}.jpg").touch()
    (tmp_path / f"{ids[0]}_0.png").touch()  # a piece is no panorama
    table = read_g3(str(tmp_path / "val.csv"))
    assert table["pano_id"].to_pylist() == ids
    result = checked(table)
    assert result.panoramas["pano_id"].to_pylist() == [ids[1]]
    assert result.panoramas["split"].to_pylist() == ["query"]  # no position, so it is neither trained on nor scored
    assert result.rejected["pano_id"].to_pylist() == [ids[0]]  # what remains to be fetched

    (tmp_path / "val.csv").write_text(f"IMG_ID,LAT,LNG\n{names[0]},1,2\n{names[4]},3,4\n")
    result = checked(read_g3(str(tmp_path / "val.csv")))
    assert result.panoramas.select(["lat", "lon", "split"]).to_pylist() == [{"lat": 3.0, "lon": 4.0, "split": "val"}]


def test_kaggle_panoramas(tmp_path):
    (tmp_path / "images.csv").write_text("id,lat,lng\np1,-33.5,151.25\np2,91,0\n")
    (tmp_path / "images").mkdir()
    for name in ("p1", "p2"):
        (tmp_path / "images" / f"{name}.jpg").touch()
    result = checked(read_kaggle(str(tmp_path)))
    row = result.panoramas.to_pylist()[0]
    assert (row["pano_id"], row["lat"], row["lon"]) == ("p1", -33.5, 151.25)
    assert (row["projection"], row["heading"]) == ("equirectangular", None)
    assert "Google" in row["licence"]
    assert result.reasons == {"lat out of range": 1}
