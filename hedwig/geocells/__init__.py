"""Geocells: a partition of the globe into the classes of the geolocator, and the geography it is made from.

`build_geocells` is the way in. Shapely's order of coordinates (x = lon, y = lat) is confined to this folder; every
public array is lat before lon, in degrees.
"""

from __future__ import annotations

from hedwig.geocells.admin import admin_membership
from hedwig.geocells.cells import Geocells, build_geocells
from hedwig.geocells.geography import AdminTable, Geography
from hedwig.geocells.kmeans import spherical_kmeans
from hedwig.geocells.plausible import refuse_swapped
from hedwig.geocells.voronoi import voronoi_polygons

__all__ = [
    "AdminTable",
    "Geocells",
    "Geography",
    "admin_membership",
    "build_geocells",
    "refuse_swapped",
    "spherical_kmeans",
    "voronoi_polygons",
]
