"""Country outlines for the page's map: Natural Earth polygons from the installed wheel, as compact GeoJSON.

Only the polygons are read, not the table of places that `Geography.default` also holds: a replica has no other use for
it. Borders are simplified together, so that two countries keep one common line. Nothing is fetched, and it is done once
for a process, when the first page asks. Borders are those of the data set, not a statement of ours.
"""

from __future__ import annotations

import functools
from typing import Any

from pydantic_core import to_json

__all__ = ["land_geojson"]

_TOLERANCE_DEG = 0.05  # as fine as a map without roads needs: 380 kB as gzip
_DIGITS = 2
_LEAST_AREA = 0.0025  # square degrees: smaller islands are less than a pixel until one is close by


@functools.cache
def land_geojson() -> bytes:
    """A FeatureCollection, one feature for each country with its ISO 3166-1 alpha-2 code in `country`.

    Raises:
        FileNotFoundError: the package with the polygons is not installed.
    """
    import shapely

    from hedwig.geocells.geography import natural_earth_countries

    table = natural_earth_countries()
    parts, rows = shapely.get_parts(table.geometry.to_numpy(), return_index=True)
    large = shapely.area(parts) > _LEAST_AREA
    parts, rows = shapely.coverage_simplify(parts[large], _TOLERANCE_DEG), rows[large]
    outlines: dict[str, list[Any]] = {}
    for part, row in zip(parts, rows, strict=True):
        if rings := [ring for ring in map(_rounded, (part.exterior, *part.interiors)) if len(ring) >= 4]:
            outlines.setdefault(str(table["ISO_A2_EH"].iloc[row]), []).append(rings)
    features = [
        {
            "type": "Feature",
            "properties": {"country": code},
            "geometry": {"type": "MultiPolygon", "coordinates": polygons},
        }
        for code, polygons in sorted(outlines.items())
    ]
    return bytes(to_json({"type": "FeatureCollection", "features": features}))


def _rounded(ring: Any) -> list[tuple[float, float]]:
    """Points [lon, lat] to the kilometre; those that fall together are told once."""
    points = [(round(x, _DIGITS), round(y, _DIGITS)) for x, y in ring.coords]
    return [point for point, before in zip(points, [None, *points], strict=False) if point != before]
