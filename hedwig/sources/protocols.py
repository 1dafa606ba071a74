"""Published evaluation protocols: their test tables as listings, and what others reported on them.

Im2GPS3k and YFCC4k are read from the tables that circulate with them (``IMG_ID, LAT, LON``; IMG_ID is the file name),
OSV-5M from its ``test.csv``. GWS15k, 14,955 Street View images, was never released: its reader takes a table that
somebody rebuilt, and numbers on such a table are not those of the papers. These are photographs, most of them of one
direction; hedwig reads them as perspective images. `PUBLISHED` holds figures as others printed them, in per cent, with
where each was read; most come from a survey's table, none was computed again here. Published methods count
``error < r`` or ``error <= r`` and use Earth radii up to 0.11 % apart, which moves none of these digits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from hedwig import storage
from hedwig.sources.datasets import read_osv5m
from hedwig.sources.readers import images_by_name, listing_table, read_csv

__all__ = ["PROTOCOLS", "PUBLISHED", "Protocol", "Published", "read_protocol"]


@dataclass(frozen=True)
class Protocol:
    """One published test set.

    Attributes:
        title: as papers call it.
        num_queries: rows of the published table; None where that could not be checked.
        tables: file names that its table goes by.
        source: for the listing's column of that name.
        licence: as its authors state it.
    """

    title: str
    num_queries: int | None
    tables: tuple[str, ...]
    source: str
    licence: str


@dataclass(frozen=True)
class Published:
    """What one publication reports on one protocol; None where it says nothing.

    Attributes:
        method: its name.
        accuracy: per cent of queries within 1, 25, 200, 750 and 2500 km.
        source: where the figures were read.
        geoscore: mean GeoScore.
        mean_km: mean error.
        median_km: median error.
    """

    method: str
    accuracy: tuple[float | None, float | None, float | None, float | None, float | None]
    source: str
    geoscore: float | None = None
    mean_km: float | None = None
    median_km: float | None = None


PROTOCOLS: Mapping[str, Protocol] = {
    "im2gps3k": Protocol(
        # 3,000 images circulate; the table names 2,997 (G3, issue 6).
        "Im2GPS3k", 2997, ("im2gps3k_places365.csv", "im2gps3k.csv"), "Flickr via Im2GPS3k",
        "Flickr, the photographers' licences",
    ),
    "yfcc4k": Protocol(
        "YFCC4k", None, ("yfcc4k_places365.csv", "yfcc4k.csv"), "Flickr via YFCC4k", "Flickr, Creative Commons as named"
    ),
    "osv5m": Protocol("OSV-5M", 210_122, ("test.csv",), "Mapillary via OpenStreetView-5M", "CC BY-SA 4.0"),
    "gws15k": Protocol(
        "GWS15k", 14_955, ("gws15k.csv",), "Street View via GWS15k",
        "Google Maps/Google Earth Additional Terms of Service",
    ),
}  # fmt: skip

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_SURVEY = "survey 'Awesome Worldwide Image Geolocalization'"
_HIERLOC = "results table published with HierLoc"
_G3 = "G3 (NeurIPS 2024)"
_NONE = (None, None, None, None, None)

PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    "im2gps3k": (
        Published("PlaNet", (8.5, 24.8, 34.3, 48.4, 64.6), _SURVEY),
        Published("ISN", (10.5, 28.0, 36.6, 49.7, 66.0), _SURVEY),
        Published("ISN base(M, f*)", (10.1, 28.0, 36.9, 51.1, 67.0), "TIBHannover/GeoEstimation"),
        Published("TransLocator", (11.8, 31.1, 46.7, 58.9, 80.1), _SURVEY),
        Published("StreetCLIP", (None, 22.4, 37.4, 61.3, 80.4), "model card geolocal/StreetCLIP"),
        Published("StreetCLIP, reproduced", (4.24, 21.79, 34.73, 55.52, 74.84), "zilunzhang/StreetCLIP-Repoduce"),
        Published("GeoCLIP", (14.11, 34.47, 50.65, 69.67, 83.82), _SURVEY),
        Published("PIGEOTTO", (11.3, 36.7, 53.8, 72.4, 85.3), _SURVEY),
        Published("Img2Loc, reproduced by G3", (15.34, 39.83, 53.59, 69.70, 82.78), _G3),
        Published("G3", (16.65, 40.94, 55.56, 71.24, 84.68), _G3),
        Published("GeoAgent", (None, 40.8, 58.6, 76.2, 89.9), _SURVEY),
        Published("HierLoc", (11.3, 43.8, 58.4, 74.1, 85.1), _SURVEY),
        Published("GeoRanker", (18.8, 45.1, 61.5, 76.3, 89.3), _SURVEY),
        Published("Pinpoint", (20.5, 47.4, 63.5, 79.0, 90.2), _SURVEY),
        Published("GeoSearch + GeoRanker", (23.6, 55.1, 67.1, 79.8, 89.6), _SURVEY),
    ),
    "yfcc4k": (
        Published("GeoCLIP", (9.59, 19.31, 32.63, 55.0, 74.69), _G3),
        Published("PIGEOTTO", (10.4, 23.7, 40.6, 62.2, 77.7), _SURVEY),
        Published("PLONK", (None, 23.7, 36.4, 54.5, 73.6), _SURVEY),
        Published("G3", (24.0, 35.9, 47.0, 64.3, 78.2), _SURVEY),
        Published("Pinpoint", (33.0, 44.4, 57.5, 71.8, 84.5), _SURVEY),
    ),
    "osv5m": (
        Published("OSV-5M baseline", _NONE, "model card osv5m/baseline", geoscore=3361, mean_km=1814),
        Published("StreetCLIP, zero shot", _NONE, _HIERLOC, geoscore=2273, mean_km=2854),
        Published("regression", _NONE, _HIERLOC, geoscore=3028, mean_km=1481),
        Published("ISNs", _NONE, _HIERLOC, geoscore=3331, mean_km=2308),
        Published("StreetCLIP, retrieval", _NONE, _HIERLOC, geoscore=3597, mean_km=1386),
        Published("PLONK RFM S2", _NONE, _HIERLOC, geoscore=3767, mean_km=1069),
        Published("HierLoc ViT-L", _NONE, _HIERLOC, geoscore=3850, mean_km=1067),
        Published("HierLoc DINOv3", _NONE, _HIERLOC, geoscore=3963, mean_km=861),
        Published("Pinpoint", (None, 35.6, 67.5, 83.7, 93.2), _SURVEY),
    ),
    "gws15k": (
        Published("GeoCLIP", (0.6, 3.1, 16.9, 45.7, 74.1), _SURVEY),
        Published("PIGEOTTO", (0.7, 9.2, 31.2, 65.7, 85.1), _SURVEY, median_km=415),
        Published("LocDiff", (2.1, 12.4, 33.7, 67.0, 85.0), _SURVEY),
    ),
}


def read_protocol(name: str, path: str, *, images: str | None = None) -> pa.Table:
    """The test table of a protocol and a folder of its images, every row in the split 'test'.

    Args:
        name: one of `PROTOCOLS`.
        path: the CSV file (``IMG_ID, LAT, LON``; also ``id``, ``latitude``, ``longitude``, ``lng``), or its folder.
        images: where the images are, by file name in any subfolder; None for the folder of the table.

    Returns:
        Table of `hedwig.sources.readers.LISTING`, one row per row of the table, in order. A ``pano_id`` is the file
        name without its suffix. A row whose image is not there has no ``image_uri``.

    Raises:
        FileNotFoundError: no such table.
        ValueError: an unknown protocol, or a table without an id or a position.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"{name!r} is no protocol that can be read; choose one of {', '.join(PROTOCOLS)}.")
    protocol, path = PROTOCOLS[name], storage.resolve(path)
    if storage.is_folder(path):
        inside = [storage.join(path, table) for table in protocol.tables]
        there = [file for file in inside if storage.exists(file)]
        if not there:
            raise FileNotFoundError(f"{path} holds none of {', '.join(protocol.tables)}; give the table itself.")
        path = there[0]
    if name == "osv5m":
        table = read_osv5m(path, images=images)
        place = table.column_names.index("split")
        return table.set_column(place, "split", pa.array(["test"] * table.num_rows, pa.string()))
    names = {"id": ("img_id", "id"), "lat": ("lat", "latitude"), "lon": ("lon", "lng", "longitude")}
    columns = read_csv(path, (), ("author", *(column for several in names.values() for column in several)))
    found: dict[str, list[str]] = {}
    for wanted, several in names.items():
        filled = [column for column in several if any(columns[column])]
        if not filled:
            raise ValueError(f"{path} has no filled column {' or '.join(several)}; {protocol.title} needs one.")
        found[wanted] = columns[filled[0]]
    files = images_by_name(images or (path.rsplit("/", 1)[0] if storage.is_remote(path) else os.path.dirname(path)))
    # MP-16 and YFCC write the two folders of a file into its id; images are looked for by the last part alone.
    ids = [os.path.splitext(name)[0] if name.lower().endswith(_SUFFIXES) else name for name in found["id"]]
    num_rows = len(ids)
    return listing_table(
        {
            "pano_id": ids,
            "lat": found["lat"],
            "lon": found["lon"],
            "projection": ["perspective"] * num_rows,
            "split": ["test"] * num_rows,
            "image_uri": [files.get(name) or files.get(name.rsplit("/", 1)[-1]) for name in ids],
            "source": [protocol.source] * num_rows,
            "licence": [protocol.licence] * num_rows,
            "author": columns["author"],
        },
        num_rows,
    )
