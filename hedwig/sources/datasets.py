"""Readers of published data sets, each from the files as their authors distribute them to a listing.

Nothing is downloaded. Images are looked for by their id below the folder of the table, or below `images`. Licences and
sources are those that the data sets state; for Street View imagery that is Google's terms, and not a free licence.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime

import pyarrow as pa

from hedwig import storage
from hedwig.sources.readers import images_by_name, listing_table, read_csv

__all__ = ["read_g3", "read_global_streetscapes", "read_kaggle", "read_osv5m"]

_G3_ID_LENGTH = 22  # of a Street View panorama id; what follows in IMG_ID is "_" and the number of the piece
_STREET_VIEW_TERMS = "Google Maps/Google Earth Additional Terms of Service"
_OSV_FILES = ("train.csv", "test.csv")
_COMMON, _PLACES = "02_metadata_common_attributes.csv", "01_simplemaps.csv"


def read_osv5m(path: str, *, images: str | None = None) -> pa.Table:
    """OpenStreetView-5M: ``train.csv`` or ``test.csv`` and the unpacked images, named ``<id>.jpg`` in any subfolder.

    Args:
        path: The CSV file, or a folder with one or both of them.
        images: Where the images are; None for the folder of the CSV file.

    Returns:
        Table of `hedwig.sources.readers.LISTING`, one row per image, in order; the split is that of the file's name.
    """
    path = storage.resolve(path)
    if storage.is_folder(path):
        files = [file for file in (storage.join(path, name) for name in _OSV_FILES) if storage.exists(file)]
        if not files:
            raise FileNotFoundError(f"{path} holds neither {' nor '.join(_OSV_FILES)}.")
        found = images_by_name(images or path)
    else:
        files, found = [path], images_by_name(images or _folder_of(path))
    return pa.concat_tables([_osv5m(file, found) for file in files])


def _osv5m(path: str, images: dict[str, str]) -> pa.Table:
    columns = read_csv(
        path, ("id", "latitude", "longitude"), ("country", "sequence", "captured_at", "creator_username")
    )
    num_rows = len(columns["id"])
    split = {"train.csv": "train", "test.csv": "test"}.get(os.path.basename(path))
    return listing_table(
        {
            "pano_id": columns["id"],
            "lat": columns["latitude"],
            "lon": columns["longitude"],
            "projection": ["perspective"] * num_rows,
            "captured_at": [_from_milliseconds(value) for value in columns["captured_at"]],
            "country": columns["country"],
            "sequence": columns["sequence"],
            "split": [split] * num_rows,
            "image_uri": [images.get(name) for name in columns["id"]],
            "source": ["Mapillary via OpenStreetView-5M"] * num_rows,
            "licence": ["CC BY-SA 4.0"] * num_rows,
            "author": columns["creator_username"],
        },
        num_rows,
    )


def read_global_streetscapes(path: str, *, images: str | None = None) -> pa.Table:
    """Global Streetscapes: its table of common attributes, and the country from its table of places where that is.

    Images are those of its own downloader, named ``<uuid>.jpeg``. A fisheye or Brown camera counts as perspective.

    Args:
        path: ``02_metadata_common_attributes.csv``, or the folder that holds it.
        images: Where the images are; None for the folder of the table.

    Returns:
        Table of `hedwig.sources.readers.LISTING`, one row per image, in order; ids are ``<source>-<orig_id>``.
    """
    path = storage.resolve(path)
    path = storage.join(path, _COMMON) if storage.is_folder(path) else path
    columns = read_csv(
        path,
        ("uuid", "source", "orig_id", "lat", "lon"),
        ("heading", "projection_type", "datetime_local", "sequence_id"),
    )
    places = storage.join(_folder_of(path), _PLACES)
    country: dict[str, str] = {}
    if storage.exists(places):
        rows = read_csv(places, ("uuid", "iso2"))
        country = dict(zip(rows["uuid"], rows["iso2"], strict=True))
    found = images_by_name(images or _folder_of(path))
    num_rows = len(columns["uuid"])
    sphere = ("spherical", "equirectangular")
    return listing_table(
        {
            "pano_id": [f"{s.lower()}-{i}" for s, i in zip(columns["source"], columns["orig_id"], strict=True)],
            "lat": columns["lat"],
            "lon": columns["lon"],
            "heading": columns["heading"],
            "projection": [
                "equirectangular" if p.lower() in sphere else "perspective" for p in columns["projection_type"]
            ],
            "captured_at": [value.replace(" ", "T", 1) for value in columns["datetime_local"]],
            "country": [country.get(uuid) for uuid in columns["uuid"]],
            "sequence": columns["sequence_id"],
            "image_uri": [found.get(uuid) for uuid in columns["uuid"]],
            "source": [f"{source} via Global Streetscapes" for source in columns["source"]],
            "licence": ["CC BY-SA 4.0"] * num_rows,
        },
        num_rows,
    )


def read_g3(path: str, *, images: str | None = None) -> pa.Table:
    """G3, Geolocation via Guidebook Grounding: the panorama ids of ``train.csv``, ``val.csv`` or ``test.csv``.

    The file names four pieces of each panorama (``YYcmZ_mdbshez6STxSxmRQ_0.png``); a panorama is one row here. It
    ships neither images nor positions: columns ``lat`` and ``lng`` are taken where somebody has added them, and an
    image is there when somebody has fetched it as ``<pano_id>.jpg``. Without one a row has an id and no ``image_uri``.

    Args:
        path: The CSV file.
        images: Where the panoramas are; None for the folder of the file.

    Returns:
        Table of `hedwig.sources.readers.LISTING`, one row per panorama, in order of its first piece.
    """
    path = storage.resolve(path)
    columns = read_csv(path, ("img_id",), ("lat", "lng", "lon", "latitude", "longitude"))
    first: dict[str, int] = {}
    for row, name in enumerate(columns["img_id"]):
        first.setdefault(name[:_G3_ID_LENGTH], row)
    found = images_by_name(images or _folder_of(path))
    rows, num_rows = list(first.values()), len(first)
    lat = [columns["lat"][row] or columns["latitude"][row] for row in rows]
    lon = [columns["lng"][row] or columns["lon"][row] or columns["longitude"][row] for row in rows]
    split = os.path.splitext(os.path.basename(path))[0]
    return listing_table(
        {
            "pano_id": list(first),
            "lat": lat,
            "lon": lon,
            "projection": ["equirectangular"] * num_rows,
            "split": [split if split in ("train", "val", "test") else None] * num_rows,
            "image_uri": [found.get(pano_id) for pano_id in first],
            "source": ["Street View via G3 guidebook"] * num_rows,
            "licence": [_STREET_VIEW_TERMS] * num_rows,
        },
        num_rows,
    )


def read_kaggle(path: str, *, images: str | None = None) -> pa.Table:
    """The "Street View Panoramas" of Kaggle: ``images.csv`` (id, lat, lng) and ``images/<id>.jpg``, 512 px wide.

    Args:
        path: The CSV file, or the folder that holds ``images.csv``.
        images: Where the images are; None for the folder of the table.

    Returns:
        Table of `hedwig.sources.readers.LISTING`, one row per panorama, in order.
    """
    path = storage.resolve(path)
    path = storage.join(path, "images.csv") if storage.is_folder(path) else path
    columns = read_csv(path, ("id", "lat", "lng"), ("heading", "country", "date"))
    found = images_by_name(images or _folder_of(path))
    num_rows = len(columns["id"])
    return listing_table(
        {
            "pano_id": columns["id"],
            "lat": columns["lat"],
            "lon": columns["lng"],
            "heading": columns["heading"],
            "projection": ["equirectangular"] * num_rows,
            "captured_at": columns["date"],
            "country": columns["country"],
            "image_uri": [found.get(pano_id) for pano_id in columns["id"]],
            "source": ["Street View via Kaggle"] * num_rows,
            "licence": [_STREET_VIEW_TERMS] * num_rows,
        },
        num_rows,
    )


def _folder_of(path: str) -> str:
    return path.rsplit("/", 1)[0] if storage.is_remote(path) else os.path.dirname(path)


def _from_milliseconds(text: str) -> str | None:
    """ISO 8601 in UTC of milliseconds since 1970; other texts, already a date perhaps, stay."""
    try:
        moment = datetime.fromtimestamp(float(text) / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return text or None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
