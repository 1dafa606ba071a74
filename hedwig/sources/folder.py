"""A folder of photographs as a listing: position, time and direction from what the camera wrote into the files.

Exif and XMP are read here to know the truth of a photograph, and end in the listing: the pixels alone go to a model.
Only headers are read, not pixels. The id is left to `hedwig.sources.check_listing`, which derives it from the content,
because file names tell places.
"""

from __future__ import annotations

import math
import re
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from hedwig import storage
from hedwig.sources.readers import IMAGE_SUFFIXES, listing_table

__all__ = ["describe_image", "read_folder"]

_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
_ARTIST, _TAKEN, _TAKEN_OFFSET = 0x013B, 0x9003, 0x9011
_LAT_REF, _LAT, _LON_REF, _LON, _DIRECTION_REF, _DIRECTION = 1, 2, 3, 4, 16, 17
_SPHERE_RATIO, _RATIO_TOLERANCE = 2.0, 0.01
_OFF_HORIZON_DEG = 1.0


def read_folder(path: str, *, num_threads: int = 8) -> pa.Table:
    """All JPEG, PNG and WebP files below a folder (local or object storage), described by their own headers.

    Args:
        path: The folder.
        num_threads: Files opened at a time.

    Returns:
        Table of `hedwig.sources.readers.LISTING` in order of path, without ids; a file that cannot be read has its
        address and nothing else, and fails with its reason where its pixels are decoded.

    Raises:
        FileNotFoundError: no folder, or no image in it.
    """
    folder = storage.resolve(path)
    files = [file for file in storage.list_files(folder, recursive=True) if file.lower().endswith(IMAGE_SUFFIXES)]
    if not files:
        raise FileNotFoundError(f"No image ({', '.join(IMAGE_SUFFIXES)}) below {folder!r}.")
    with ThreadPoolExecutor(num_threads, thread_name_prefix="exif") as pool:
        rows = list(pool.map(describe_image, files))
    names = ("lat", "lon", "heading", "projection", "captured_at", "author", "image_uri")
    return listing_table({name: [row.get(name) for row in rows] for name in names}, len(rows))


def describe_image(uri: str) -> dict[str, Any]:
    """What an image file says of itself, as far as it does: the columns of a listing by name.

    Exif 2.32: position (GPSLatitude and GPSLongitude), direction of the camera (GPSImgDirection; one relative to
    magnetic north is left out, since a heading is from true north), time with its offset, artist. Photo Sphere XMP
    metadata (GPano) goes before Exif: the projection, and PoseHeadingDegrees as the heading of the centre column. A
    sphere of which only some degrees of heading are there is a perspective image here, cut from left to right. One
    whose middle row is not the horizon gets a projection that `check_listing` rejects, since all that hedwig knows have
    it there. Without GPano, an image exactly twice as wide as high is taken for a whole sphere.
    """
    row: dict[str, Any] = {"image_uri": uri}
    from PIL import Image

    filesystem, inner = storage.filesystem(uri)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged Exif: read what there is
            with filesystem.open_input_file(inner) as stream, Image.open(stream) as image:
                width, height = image.size
                exif = image.getexif()
                gps, taken = exif.get_ifd(_GPS_IFD), exif.get_ifd(_EXIF_IFD)
                artist = exif.get(_ARTIST)
                xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, struct.error, Image.DecompressionBombError):
        return row
    lat, lon = _degrees(gps, _LAT, _LAT_REF, "S"), _degrees(gps, _LON, _LON_REF, "W")
    row |= {"lat": lat, "lon": lon, "captured_at": _moment(taken)}
    row["author"] = artist.strip("\0 ") if isinstance(artist, str) else None
    if str(gps.get(_DIRECTION_REF, "T")).strip("\0 ").upper() != "M":
        row["heading"] = _number(gps.get(_DIRECTION))
    text = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp)
    return row | _sphere(text, width, height)


def _sphere(xmp: str, width: int, height: int) -> dict[str, Any]:
    """Projection, and heading where it is known, from GPano properties (attributes or elements) or the aspect ratio."""
    kind = _property(xmp, "ProjectionType")
    if kind is None:
        is_sphere = abs(width / max(1, height) - _SPHERE_RATIO) <= _RATIO_TOLERANCE
        return {"projection": "equirectangular" if is_sphere else "perspective"}
    if kind.lower() != "equirectangular":
        return {"projection": "perspective"}
    full, shown = _number(_property(xmp, "FullPanoWidthPixels")), _number(_property(xmp, "CroppedAreaImageWidthPixels"))
    left = _number(_property(xmp, "CroppedAreaLeftPixels"))
    pose = _number(_property(xmp, "PoseHeadingDegrees"))
    whole = not full or not shown or shown >= 0.99 * full
    row: dict[str, Any] = {"projection": "equirectangular" if whole else "perspective"}
    below, above = _elevations(xmp, full)
    if whole and abs(above + below) / 2 > _OFF_HORIZON_DEG:
        row["projection"] = f"sphere cropped to {below:.1f} to {above:.1f} degrees of elevation, not about the horizon"
    if pose is not None:
        turn = 0.0 if whole or not full or not shown else ((left or 0.0) + shown / 2) / full * 360 - 180
        row["heading"] = (pose + turn) % 360
    return row


def _elevations(xmp: str, full_width: float | None) -> tuple[float, float]:
    """The lowest and the highest elevation, degrees, that a GPano crop shows; -90 and 90 where it does not say."""
    top, shown = (
        _number(_property(xmp, "CroppedAreaTopPixels")),
        _number(_property(xmp, "CroppedAreaImageHeightPixels")),
    )
    full = _number(_property(xmp, "FullPanoHeightPixels")) or (full_width or 0) / 2
    if not full or top is None or shown is None:
        return -90.0, 90.0
    return 90 - (top + shown) / full * 180, 90 - top / full * 180


def _property(xmp: str, name: str) -> str | None:
    found = re.search(rf'GPano:{name}\s*(?:=\s*["\']([^"\']*)["\']|>([^<]*)<)', xmp)
    return (found.group(1) or found.group(2) or "").strip() if found else None


def _degrees(gps: Any, tag: int, ref_tag: int, negative: str) -> float | None:
    """Degrees, minutes and seconds with their hemisphere, as signed degrees; None where a part is missing."""
    parts = gps.get(tag)
    if not isinstance(parts, tuple | list) or len(parts) != 3:
        return None
    numbers = [_number(part) for part in parts]
    degrees, minutes, seconds = (0.0 if number is None else number for number in numbers)
    if numbers[0] is None:
        return None
    ref = gps.get(ref_tag)
    ref = ref.decode("ascii", "replace") if isinstance(ref, bytes) else str(ref or "")
    if not ref.strip("\0 "):
        return None  # without the hemisphere the place may be on another continent
    size = degrees + minutes / 60 + seconds / 3600
    return -size if ref.strip("\0 ").upper().startswith(negative) else size


def _number(value: Any) -> float | None:
    """A finite float, or None; a rational with denominator 0 is how cameras write "unknown"."""
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) else None


def _moment(taken: Any) -> str | None:
    """ISO 8601 of DateTimeOriginal ("2023:08:23 10:30:40"), with OffsetTimeOriginal where there is one."""
    text = taken.get(_TAKEN)
    found = re.match(r"(\d{4}):(\d\d):(\d\d) (\d\d:\d\d:\d\d)", text) if isinstance(text, str) else None
    if found is None or found.group(1) == "0000":
        return None
    offset = taken.get(_TAKEN_OFFSET)
    offset = offset.strip("\0 ") if isinstance(offset, str) else ""
    return "{}-{}-{}T{}".format(*found.groups()) + (offset if re.fullmatch(r"[+-]\d\d:\d\d", offset) else "")
