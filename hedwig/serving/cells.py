"""The geocells as a map: GeoJSON of a run's ``geocells.parquet``, simplified, with a tag that names its content.

It is read once for a release and written once for each tolerance; what a browser has already it gets by ETag. Borders
are simplified together where shapely can (`coverage_simplify`), so that neighbours keep their common border and no
gaps open; nothing crosses the antimeridian, because the polygons are made that way.
"""

from __future__ import annotations

import math
import threading
from typing import Any

from pydantic_core import to_json

from hedwig import storage
from hedwig.serving.answers import GEOJSON_TYPE
from hedwig.serving.tagged import Tagged

__all__ = ["CellMaps"]

_PROPERTIES = ("cell_id", "country", "admin1", "num_panoramas", "radius_km", "lat", "lon")
_MOST_KEPT = 8  # tolerances; the next one empties the memory
_MOST_DIGITS = 6


class CellMaps:
    """The maps of one folder of geocells.

    Args:
        folder: With ``geocells.parquet``; local or on object storage.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._table: Any = None
        self._kept: dict[float, Tagged] = {}
        self._lock = threading.Lock()

    def get(self, tolerance_deg: float) -> Tagged:
        """The map at this tolerance, in degrees; call it in a thread."""
        with self._lock:
            if tolerance_deg not in self._kept:
                if len(self._kept) >= _MOST_KEPT:
                    self._kept.clear()
                self._kept[tolerance_deg] = _written(self._read(), tolerance_deg)
            return self._kept[tolerance_deg]

    def _read(self) -> Any:
        if self._table is None:
            import geopandas

            with storage.local_copy(self._folder) as folder:
                self._table = geopandas.read_parquet(folder / "geocells.parquet")
        return self._table


def _written(table: Any, tolerance_deg: float) -> Tagged:
    import shapely

    polygons = table.geometry.to_numpy()
    if tolerance_deg > 0:
        simplified = shapely.coverage_simplify(polygons, tolerance_deg)
        # A cell smaller than the tolerance may vanish; it keeps its own border then.
        polygons = [own if new.is_empty else new for own, new in zip(polygons, simplified, strict=True)]
    digits = (
        _MOST_DIGITS if tolerance_deg == 0 else min(_MOST_DIGITS, max(1, 1 - math.floor(math.log10(tolerance_deg))))
    )
    columns = {name: table[name].tolist() for name in _PROPERTIES if name in table}
    features = [
        {
            "type": "Feature",
            "id": columns["cell_id"][row],
            "geometry": _rounded(polygon.__geo_interface__, digits),
            "properties": {name: values[row] for name, values in columns.items()},
        }
        for row, polygon in enumerate(polygons)
    ]
    plain = to_json({"type": "FeatureCollection", "features": features}, inf_nan_mode="null")
    return Tagged.of(plain, GEOJSON_TYPE)


def _rounded(geometry: dict[str, Any], digits: int) -> dict[str, Any]:
    """Rings with rounded numbers, RFC 7946; points that fall together are told once."""

    def of(coordinates: Any) -> Any:
        if isinstance(coordinates[0][0], float | int):
            ring = [(round(x, digits), round(y, digits)) for x, y in coordinates]
            kept = [point for point, before in zip(ring, [None, *ring], strict=False) if point != before]
            return kept if len(kept) >= 4 else [tuple(point) for point in coordinates]
        return [of(part) for part in coordinates]

    return {"type": geometry["type"], "coordinates": of(geometry["coordinates"])}
