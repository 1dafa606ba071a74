"""Partition of the globe by labelled anchors: nearest-anchor membership drawn as lon/lat polygons.

The truth is `nearest_anchor` on unit vectors, which knows neither poles nor antimeridian. The polygons are only its
picture, made so that they cannot overlap or leave a gap: the Voronoi edges between anchors of *different* labels are
drawn as lines into the box [-180, 180] × [-90, 90], the lines are noded and polygonised, and each face takes the label
of the anchor nearest to a point inside it. The spherical Delaunay triangulation comes from GEOS after a stereographic
projection from one of the anchors (circles stay circles): GEOS decides the in-circle test in double-double arithmetic,
where the convex hull behind scipy's SphericalVoronoi loses points less than about 10 m apart. Edges are great circles
and are densified, finely where an anchor is close. This module is not a planar Voronoi of longitudes and latitudes.
Shapely's order (x = lon, y = lat) stays inside.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hedwig.geo import lat_lon, unit_vectors

__all__ = ["nearest_anchor", "sphere_delaunay", "voronoi_polygons"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STEP_RAD = np.pi / 180  # an edge piece is at most this long, and at most one degree of longitude wide
FLAT = 1e-9  # an edge whose plane holds the axis to this accuracy (6 mm) is drawn as a meridian
JITTER = 1e-13


def nearest_anchor(tree: cKDTree, lat: ArrayLike, lon: ArrayLike) -> tuple[Floats, Ints]:
    """Chord length (N,) to, and row (N,) of, the anchor nearest to each point; `tree` holds unit vectors."""
    chord, row = tree.query(unit_vectors(lat, lon))
    return np.asarray(chord, dtype=np.float64), np.asarray(row, dtype=np.int64)


def sphere_delaunay(vectors: ArrayLike) -> Ints:
    """Delaunay triangulation of distinct unit vectors (N, 3): (2N-4, 3) rows, counter-clockwise from outside.

    Empty when the points lie on one circle (always so for N <= 3): there the triangulation is not unique.
    """
    v = np.asarray(vectors, dtype=np.float64)
    if len(v) < 4:
        return np.empty((0, 3), dtype=np.int64)
    pole = v[0]
    east = np.cross(pole, np.eye(3)[np.argmin(np.abs(pole))])
    east /= np.linalg.norm(east)
    north = np.cross(pole, east)
    # regular grids put four anchors on a circle; half a micrometre of jitter spares GEOS the undecidable cases
    rest = v[1:] + np.random.default_rng(0).normal(0, JITTER, (len(v) - 1, 3))
    # |p - pole|^2 / 2 is 1 - p·pole without the cancellation, so that anchors metres from the pole stay distinct
    depth = ((rest - pole) ** 2).sum(axis=1) / 2
    plane = np.stack([rest @ east, rest @ north], axis=1) / depth[:, None]
    corners = shapely.get_coordinates(shapely.delaunay_triangles(shapely.multipoints(plane)))
    if len(corners) == 0:
        return np.empty((0, 3), dtype=np.int64)
    corners = corners.reshape(-1, 4, 2)[:, :3]
    keys = plane[:, 0] + 1j * plane[:, 1]
    order = np.argsort(keys)
    triangles = order[np.searchsorted(keys[order], corners[..., 0] + 1j * corners[..., 1])] + 1
    (x1, y1), (x2, y2), (x3, y3) = (corners[:, i].T for i in range(3))
    clockwise = (x2 - x1) * (y3 - y1) < (x3 - x1) * (y2 - y1)
    triangles[clockwise] = triangles[clockwise][:, ::-1]
    half_edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    _, first, counts = np.unique(np.sort(half_edges, axis=1), axis=0, return_index=True, return_counts=True)
    hull = half_edges[first[counts == 1]]
    # the projection centre sees the hull from outside; seen from outside the sphere everything turns round
    closing = np.column_stack([hull[:, ::-1], np.zeros(len(hull), dtype=np.int64)])
    return np.concatenate([triangles, closing]).astype(np.int64)[:, ::-1]


def voronoi_polygons(lat: ArrayLike, lon: ArrayLike, labels: ArrayLike) -> tuple[Ints, NDArray[np.object_]]:
    """Polygons of the regions nearest to the anchors of each label; disjoint, valid, together the whole globe.

    Args:
        lat: degrees (N,), no two anchors at the same place.
        lon: degrees (N,).
        labels: integers (N,).

    Returns:
        The sorted distinct labels (C,) and their polygons (C,), lon/lat in [-180, 180] × [-90, 90], split at the
        antimeridian, with an edge along ±90° where a pole lies inside. A label whose region is smaller than the
        arithmetic can draw gets an empty polygon.

    Raises:
        ValueError: no anchors, or two anchors at the same place.
    """
    vectors, labels = unit_vectors(lat, lon).reshape(-1, 3), np.asarray(labels, dtype=np.int64)
    if len(vectors) == 0:
        raise ValueError("A Voronoi partition needs at least one anchor; 0 were given.")
    if len(np.unique(vectors, axis=0)) < len(vectors):
        raise ValueError(
            f"{len(vectors)} anchors lie at {len(np.unique(vectors, axis=0))} places; keep one anchor a place."
        )
    names = np.unique(labels)
    lines = [shapely.linestrings([(-180, -90), (180, -90), (180, 90), (-180, 90), (-180, -90)])]
    lines += _boundary_lines(vectors, labels) if len(names) > 1 else []
    faces = shapely.get_parts(shapely.polygonize([shapely.union_all(lines)]))
    inside = shapely.get_coordinates(shapely.point_on_surface(faces))
    face_labels = labels[nearest_anchor(cKDTree(vectors), inside[:, 1], inside[:, 0])[1]]
    polygons = np.empty(len(names), dtype=object)
    for i, name in enumerate(names):
        own = faces[face_labels == name]
        polygons[i] = shapely.union_all(own) if len(own) != 1 else own[0]
    return names, polygons


def _boundary_lines(vectors: Floats, labels: Ints) -> list[Any]:
    """Lines (lon, lat) along the Voronoi edges that part two labels, pieces split at the antimeridian."""
    start, end, normal, anchor = _boundary_edges(vectors, labels)
    across = np.cross(normal, start)
    angle = np.arctan2((end * across).sum(axis=1), (end * start).sum(axis=1)) % (2 * np.pi)
    angle[angle > np.pi + 1e-6] -= 2 * np.pi  # rounding turned an edge of almost no length the wrong way
    clearance = np.abs((anchor * normal).sum(axis=1))
    near = 2 * np.sqrt(clearance) * np.maximum(np.hypot(start[:, 0], start[:, 1]), 0.05)
    (lat1, lon1), (lat2, lon2) = lat_lon(start), lat_lon(end)
    straight = (np.abs(lon1 - lon2) < 1) & (np.abs(angle) < np.minimum(near, STEP_RAD))
    straight &= (np.maximum(np.abs(lon1), np.abs(lon2)) < 180) & (np.maximum(np.abs(lat1), np.abs(lat2)) < 89)
    straight |= (angle < 0) & (np.abs(lon1 - lon2) < 1)
    ends = np.stack([np.stack([lon1, lat1], axis=1), np.stack([lon2, lat2], axis=1)], axis=1)
    lines = list(shapely.linestrings(ends[straight]))
    for i in np.flatnonzero(~straight & (angle > 0)):
        foot = np.arctan2(anchor[i] @ across[i], anchor[i] @ start[i])
        turns = _turns(float(angle[i]), float(foot), float(near[i]))
        frame = (start[i], across[i], normal[i])
        draw = _meridian if abs(normal[i, 2]) < FLAT else _arc
        lines += [
            shapely.linestrings(piece) for piece in draw(frame, turns, ends[i]) if len(np.unique(piece, axis=0)) > 1
        ]
    return lines


def _boundary_edges(vectors: Floats, labels: Ints) -> tuple[Floats, Floats, Floats, Floats]:
    """Voronoi edges (E, 3) between different labels: start, end, plane normal (turning start to end), one anchor."""
    triangles = sphere_delaunay(vectors)
    if len(triangles) == 0:
        return _circle_edges(vectors, labels)
    centres = _circumcentres(vectors, triangles)
    tails = triangles.T.ravel()
    heads = triangles[:, [1, 2, 0]].T.ravel()
    left_of = np.tile(np.arange(len(triangles)), 3)
    order = np.lexsort((tails > heads, np.maximum(tails, heads), np.minimum(tails, heads)))
    forth, back = order[0::2], order[1::2]  # every edge occurs once in each direction: the triangulation is closed
    parts = labels[tails[forth]] != labels[heads[forth]]
    forth, back = forth[parts], back[parts]
    tail, head = vectors[tails[forth]], vectors[heads[forth]]
    normal = tail - head
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return centres[left_of[back]], centres[left_of[forth]], normal, tail


def _circumcentres(vectors: Floats, triangles: Ints) -> Floats:
    """Unit vectors (T, 3) equally far from the corners, on the side without other anchors.

    The direction is the triangle's normal, but the normal of a triangle of metres tilts by more than the triangle:
    there the planar circumcentre, an offset from a corner, keeps its relative accuracy.
    """
    a, b, c = (vectors[triangles[:, i]] for i in range(3))
    b, c = b - a, c - a
    normal = np.cross(b, c)
    area_sq = (normal**2).sum(axis=1, keepdims=True)
    centres = normal / np.sqrt(area_sq)
    offset = np.cross((b**2).sum(axis=1, keepdims=True) * c - (c**2).sum(axis=1, keepdims=True) * b, normal)
    offset /= 2 * area_sq
    small = ((offset**2).sum(axis=1) < 0.01) & ((centres * a).sum(axis=1) > 0)
    centres[small] = a[small] + offset[small]
    return np.asarray(centres / np.linalg.norm(centres, axis=1, keepdims=True))


def _circle_edges(vectors: Floats, labels: Ints) -> tuple[Floats, Floats, Floats, Floats]:
    """The same for anchors on one circle: half great circles from end to end of its axis, cut in two."""
    if len(vectors) == 2:
        axis = np.cross(vectors[0], vectors[1])
        if np.linalg.norm(axis) < 1e-12:  # antipodes: every perpendicular will do
            axis = np.cross(vectors[0], np.eye(3)[np.argmin(np.abs(vectors[0]))])
    else:
        far = vectors[np.argmax(((vectors - vectors[0]) ** 2).sum(axis=1))]
        spans = np.cross(far - vectors[0], vectors - vectors[0])
        axis = spans[np.argmax((spans**2).sum(axis=1))]
    axis = axis / np.linalg.norm(axis)
    x = vectors[0] - (vectors[0] @ axis) * axis
    x /= np.linalg.norm(x)
    turn = np.arctan2(vectors @ np.cross(axis, x), vectors @ x)
    order = np.argsort(turn)
    after = np.roll(order, -1)
    middle = turn[order] + ((turn[after] - turn[order]) % (2 * np.pi)) / 2
    parts = labels[order] != labels[after]
    middle, anchor = middle[parts], vectors[order[parts]]
    towards = np.cos(middle)[:, None] * x + np.sin(middle)[:, None] * np.cross(axis, x)
    ends = np.broadcast_to(axis, towards.shape)
    normal = np.cross(towards, ends)
    two = (np.concatenate([-ends, towards]), np.concatenate([towards, ends]))
    return (*two, np.concatenate([normal, normal]), np.concatenate([anchor, anchor]))


def _turns(angle: float, foot: float, near: float) -> Floats:
    """Angles in [0, angle] at which to sample an edge; `foot` is where an anchor comes nearest.

    A chord of length s strays from its arc by about s^2 / 16 in the lon/lat plane, and no anchor is nearer to the point
    at angle t than |t - foot|: steps that grow from `near` = 2 sqrt(clearance) keep every anchor on its own side.
    """
    turns = [np.linspace(0.0, angle, 2 + int(angle / STEP_RAD)), np.array([foot])]
    while near < STEP_RAD:
        turns.append(np.array([foot - near, foot + near]))
        near *= 3
    together = np.unique(np.concatenate(turns))
    return together[(together >= 0) & (together <= angle)]


def _arc(frame: tuple[Floats, Floats, Floats], turns: Floats, ends: Floats) -> list[Floats]:
    """Pieces (K, 2) of lon/lat of an edge on which longitude runs one way: all edges but meridians."""
    start, across, normal = frame
    sign = np.sign(normal[2])
    first, last = ends[0, 0], ends[1, 0]
    first = -sign * 180.0 if first == sign * 180 else first
    width = (sign * (last - first)) % 360
    if width > 181:  # rounding: a step backwards
        return [ends] if abs(ends[0, 0] - ends[1, 0]) < 1 else []
    bend = -(normal[:2] / normal[2])
    lat, lon = lat_lon(np.outer(np.cos(turns[1:-1]), start) + np.outer(np.sin(turns[1:-1]), across))
    passed = (sign * (lon - first)) % 360
    grid = np.linspace(0.0, width, 2 + int(width))[1:-1]
    to_seam = 180 - sign * first
    if to_seam < width:
        grid = np.append(grid, to_seam)
    radians = np.radians(first + sign * grid)
    grid_lat = np.degrees(np.arctan(bend[0] * np.cos(radians) + bend[1] * np.sin(radians)))
    passed, lat = np.concatenate([passed, grid]), np.concatenate([lat, grid_lat])
    keep = np.flatnonzero((passed > 0) & (passed < width))
    keep = keep[np.argsort(passed[keep])]
    passed = np.concatenate([[0.0], passed[keep], [width]])
    lat = np.concatenate([[ends[0, 1]], lat[keep], [ends[1, 1]]])
    if to_seam >= width:
        lon = first + sign * passed
        lon[-1] = sign * 180.0 if to_seam == width else last
        return [np.stack([lon, lat], axis=1)]
    seam = int(np.searchsorted(passed, to_seam))
    lon = first + sign * passed
    before, after = lon[: seam + 1], lon[seam:] - sign * 360
    before[-1], after[0], after[-1] = sign * 180.0, -sign * 180.0, last
    return [np.stack([before, lat[: seam + 1]], axis=1), np.stack([after, lat[seam:]], axis=1)]


def _meridian(frame: tuple[Floats, Floats, Floats], turns: Floats, ends: Floats) -> list[Floats]:
    """Pieces (K, 2) of lon/lat of an edge along a meridian; a pole on the way becomes a stretch of the ±90° line."""
    start, across, _ = frame
    lat, lon = lat_lon(np.outer(np.cos(turns), start) + np.outer(np.sin(turns), across))
    lat[[0, -1]], lon[[0, -1]] = ends[:, 1], ends[:, 0]
    at_pole = np.abs(np.abs(lat) - 90) < 1e-7
    points: list[tuple[float, float]] = []
    pole_turn = np.arctan2(across[2], start[2]) % np.pi
    pole_lat = 90.0 if np.cos(pole_turn) * start[2] + np.sin(pole_turn) * across[2] > 0 else -90.0
    poles = [(pole_turn - np.pi, -pole_lat), (pole_turn, pole_lat), (pole_turn + np.pi, -pole_lat)]
    poles = [(t, p) for t, p in poles if turns[0] - 2e-9 <= t <= turns[-1] + 2e-9]
    samples = [(float(t), float(x), float(y)) for t, x, y in zip(turns, lon, lat, strict=True)]
    samples = [s for s, pole in zip(samples, at_pole, strict=True) if not pole]
    for i, (turn, x, y) in enumerate(samples):
        passed = [p for t, p in poles if t < turn and (i == 0 or t > samples[i - 1][0])]
        if passed:
            points += [(points[-1][0], passed[0])] if points else []
            points.append((x, passed[0]))
        elif points and abs(points[-1][0] - x) > 180:  # the antimeridian itself: stay on one side of the map
            x = float(np.copysign(180.0, points[-1][0]))
        points.append((x, y))
    points += [(points[-1][0], p) for t, p in poles if samples and t > samples[-1][0]]
    return [np.array(points)] if len(points) > 1 else []
