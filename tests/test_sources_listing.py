import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hedwig.schema import SchemaError
from hedwig.sources import read_listing


def write(tmp_path, text, name="l.csv"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_csv_keeps_every_row_in_order_and_knows_synonyms(tmp_path):
    frame = read_listing(
        write(tmp_path, "id,Latitude,lng,path,secret\n1,1.5,2,a.jpg,x\n2,,,b.jpg,y\n3,abc,4,c.jpg,z\n")
    )
    assert frame["image_uri"].tolist() == ["a.jpg", "b.jpg", "c.jpg"]
    assert frame["lat"].tolist()[0] == 1.5
    assert np.isnan(frame["lat"][1])
    assert frame["lat_text"].tolist() == ["1.5", None, "abc"]  # what was written is kept for the reason
    assert "secret" not in frame.columns
    assert frame["pano_id"].tolist() == [None, None, None]


def test_texts_that_look_like_missing_values_stay_texts(tmp_path):
    frame = read_listing(write(tmp_path, "pano_id,lat,lon,country,image_uri\nNA,1,2,NA,a.jpg\n007,1,2,,b.jpg\n"))
    assert frame["country"].tolist() == ["NA", None]  # Namibia
    assert frame["pano_id"].tolist() == ["NA", "007"]


def test_parquet_and_geoparquet(tmp_path):
    table = pa.table({"pano_id": ["a"], "lat": [1.0], "lon": [2.0], "image_uri": ["x.jpg"], "extra": [3]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert read_listing(str(tmp_path / "t.parquet"))["lon"].tolist() == [2.0]
    import geopandas

    points = geopandas.GeoDataFrame(
        {"image_uri": ["x.jpg"]}, geometry=geopandas.points_from_xy([7.0], [50.0]), crs="EPSG:4326"
    )
    points.to_parquet(tmp_path / "g.geoparquet")
    frame = read_listing(str(tmp_path / "g.geoparquet"))
    assert (frame["lat"][0], frame["lon"][0]) == (50.0, 7.0)


def test_a_folder_of_parquet_is_one_listing(tmp_path):
    for i in range(2):
        pq.write_table(pa.table({"lat": [1.0], "lon": [2.0], "image_uri": [f"{i}.jpg"]}), tmp_path / f"{i}.parquet")
    assert read_listing(str(tmp_path))["image_uri"].tolist() == ["0.jpg", "1.jpg"]


def test_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="No panorama listing"):
        read_listing(str(tmp_path / "none.csv"))
    with pytest.raises(SchemaError, match="lacks the column"):
        read_listing(write(tmp_path, "a,b\n1,2\n"))
    with pytest.raises(ValueError, match="cannot be read"):
        read_listing(write(tmp_path, "not parquet", "x.parquet"))
    with pytest.raises(ValueError, match="neither"):
        read_listing(write(tmp_path, "x", "x.txt"))


def test_the_shared_listing(shared):
    frame = read_listing(str(shared / "data" / "real_images.csv"))
    assert len(frame) == 284
    assert int(frame["lat"].isna().sum()) == 39
    assert isinstance(frame, pd.DataFrame)
