"""Geocells: a partition of the globe into the classes of the geolocator, and the geography it is made from.

`build_geocells` is the way in, `measure` says how good a partition is. Shapely's order of coordinates (x = lon,
y = lat) is confined to this folder; every public array is lat before lon, in degrees.
"""

from __future__ import annotations

from hedwig.geocells.admin import admin_membership
from hedwig.geocells.builders import METHODS, Method, build_geocells
from hedwig.geocells.cells import Geocells
from hedwig.geocells.geography import AdminTable, Geography
from hedwig.geocells.hierarchy import Level
from hedwig.geocells.kmeans import spherical_kmeans
from hedwig.geocells.measure import measure, measure_published
from hedwig.geocells.plausible import refuse_swapped
from hedwig.geocells.points import read_points
from hedwig.geocells.quadtree import PublishedQuadtree
from hedwig.geocells.voronoi import voronoi_polygons

__all__ = [
    "METHODS",
    "AdminTable",
    "Geocells",
    "Geography",
    "Level",
    "Method",
    "PublishedQuadtree",
    "admin_membership",
    "build_geocells",
    "measure",
    "measure_published",
    "read_points",
    "refuse_swapped",
    "spherical_kmeans",
    "voronoi_polygons",
]
