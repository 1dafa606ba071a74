"""The data card: counts, gaps and duplicates by hand, files beside the table, nothing in it runs as markup."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from hedwig import storage
from hedwig.acquisition.card import data_card, read_card_table, write_card
from hedwig.geocells import Geography

LATER = "2021-05-04T10:00:00Z"


def table():
    return pd.DataFrame(
        [
            ("a", 48.77, 9.17, 0.0, LATER, "DE", "Mapillary", "CC BY-SA 4.0", "ann", "s1"),
            ("a", 48.77, 9.17, 90.0, LATER, "DE", "Mapillary", "CC BY-SA 4.0", "ann", "s2"),  # another bearing
            ("b", 48.77005, 9.17, 0.0, LATER, None, "Mapillary", "CC BY-SA 4.0", "bob", "s1"),  # 5.6 m off, same bytes
            ("c", 48.77005, 9.17, 0.0, "2019-07", "DE", "Mapillary", None, "bob", "s3"),  # another time
            ("d", 48.7702, 9.17, 0.0, LATER, "DE", "Panoramax", "CC0", None, None),  # 17 m from b
            ("d", 48.7702, 9.17, 0.0, LATER, "DE", "Panoramax", "CC0", None, None),
            ("e", np.nan, np.nan, np.nan, "1620000000000", None, "Panoramax", "CC0", None, None),
        ],
        columns=["pano_id", "lat", "lon", "heading", "captured_at", "country", "source", "licence", "author", "sha256"],
    )


def test_counts_gaps_and_duplicates():
    card = data_card(table())
    assert (card["num_rows"], card["num_panoramas"], card["num_positions"]) == (7, 5, 6)
    assert card["counts"]["source"] == {"Mapillary": 3, "Panoramax": 2}
    assert card["counts"]["country"] == {"DE": 3, "unknown": 2}
    assert card["counts"]["year"] == {"2021": 4, "2019": 1}
    assert card["counts"]["licence"] == {"CC BY-SA 4.0": 2, "CC0": 2, "unknown": 1}
    assert card["counts"]["author"] == {"bob": 2, "unknown": 2, "ann": 1}
    assert card["duplicates"] == {"same_sha256": 1, "same_pano_id": 1, "near_same_time": 2}
    assert card["missing"]["country"] == 2
    assert card["missing"]["image_uri"] == 7
    assert card["absent"] == ["image_uri"]
    assert card["extent"] == {"south": 48.77, "north": 48.7702, "west": 9.17, "east": 9.17}
    json.dumps(card)


def test_the_geography_names_countries_that_are_missing():
    card = data_card(table(), geography=Geography.default())
    assert card["counts"]["country"] == {"DE": 4, "unknown": 1}
    assert card["num_countries_looked_up"] == 1
    assert card["missing"]["country"] == 2  # what the table lacks, whatever was found


def test_near_duplicates_agree_with_all_pairs():
    from hedwig.geo import haversine_km

    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"lat": 48 + rng.uniform(0, 3e-3, 300), "lon": 9 + rng.uniform(0, 3e-3, 300)})
    rows["captured_at"] = rng.choice(["2020", "2021", "2022"], 300)
    lat, lon, time = (rows[n].to_numpy() for n in ("lat", "lon", "captured_at"))
    pairs = (haversine_km(lat[:, None], lon[:, None], lat, lon) < 0.01) & (time[:, None] == time)
    np.fill_diagonal(pairs, False)
    assert 10 < pairs.any(axis=1).sum() < 290
    assert data_card(rows)["duplicates"]["near_same_time"] == pairs.any(axis=1).sum()


def test_an_empty_table_has_a_card(tmp_path):
    card = data_card(table().head(0))
    assert (card["num_rows"], card["extent"]) == (0, None)
    path = tmp_path / "none.csv"
    table().head(0).to_csv(path, index=False)
    assert write_card(str(path), geography=Geography.default())["num_panoramas"] == 0


def test_files_lie_beside_the_table_and_names_are_escaped(tmp_path):
    rows = table()
    rows.loc[0:1, "author"] = "<script>alert(1)</script>|x"
    rows.rename(columns={"author": "Creator", "licence": "License"}).to_csv(tmp_path / "list.csv", index=False)
    card = write_card(str(tmp_path / "list.csv"), geography=Geography.default())
    assert {p.name for p in tmp_path.iterdir()} == {
        "list.csv",
        *(f"list.card.{e}" for e in ("json", "md", "html", "png")),
    }
    page, text = ((tmp_path / f"list.card.{e}").read_text() for e in ("html", "md"))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "data:image/png;base64," in page
    assert r"\<script\>" in text
    assert r"\|x" in text
    assert "| Mapillary | 3 |" in text
    assert json.loads((tmp_path / "list.card.json").read_text())["num_panoramas"] == card["num_panoramas"] == 5
    assert Image.open(tmp_path / "list.card.png").size[0] == 1680


def test_a_folder_of_parquet_has_its_card_beside_it(tmp_path):
    folder = str(tmp_path / "panoramas")
    storage.write_table(storage.join(folder, "part-00000.parquet"), pa.Table.from_pandas(table(), preserve_index=False))
    card = write_card(folder + "/", geography=Geography.default())
    assert card["num_rows"] == 7
    assert (tmp_path / "panoramas.card.md").is_file()
    assert [p.name for p in (tmp_path / "panoramas").iterdir()] == ["part-00000.parquet"]


def test_real_metadata_has_a_card(shared):
    rows = read_card_table(str(shared / "data/global_streetscapes_metadata/02_metadata_common_attributes.csv"))
    card = data_card(rows)
    assert card["num_rows"] == 2319
    assert card["counts"]["source"]["Mapillary"] > 1000
    assert "unknown" not in card["counts"]["year"]
    assert sum(card["counts"]["year"].values()) == 2319


def test_wrong_paths_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_card_table(str(tmp_path / "nowhere.csv"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="no table"):
        read_card_table(str(tmp_path / "a.txt"))


def test_the_extent_across_the_antimeridian_is_the_short_one():
    fiji = pd.DataFrame({"lat": [-17.0, -18.0, -16.5], "lon": [178.0, -179.5, 179.25]})
    assert data_card(fiji)["extent"] == {"south": -18.0, "north": -16.5, "west": 178.0, "east": -179.5}
    plain = pd.DataFrame({"lat": [1.0, 2.0], "lon": [-60.0, 60.0]})
    assert data_card(plain)["extent"] == {"south": 1.0, "north": 2.0, "west": -60.0, "east": 60.0}
