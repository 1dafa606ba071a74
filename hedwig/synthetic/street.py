"""Everything that stands up: house fronts, poles and wires, trees, signs, posts, cars, the landmark.

House fronts are one sheet on each side of the road, cut into houses: each column of the image meets one wall (a front,
or the end wall of the next house behind a gap), so all houses are drawn in one vectorised pass. The rest are cut-outs
(`hedwig.synthetic.sprites`) placed in metres and drawn from far to near.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedwig.synthetic.backdrop import Rays
from hedwig.synthetic.climate import TREE_KINDS
from hedwig.synthetic.scene import CAMERA_HEIGHT_M, Scene
from hedwig.synthetic.script import sign_board
from hedwig.synthetic.sprites import car, landmark, paste, shadow, tree

__all__ = ["draw_houses", "draw_objects"]

Floats = NDArray[Any]

_STREET_M = 130.0  # houses stand this far along the road
_STOREY_M = 3.2


def setback_m(scene: Scene) -> float:
    """Distance of the house fronts from the centre line."""
    return scene.road_half_width_m + 4.0 + 6.0 * (1 - scene.urban)


def _house_row(scene: Scene, side: str) -> dict[str, Floats]:
    """Houses of one side, from back to front: (n,) edges and heights in metres, (n, 3) colours."""
    random = scene.random(f"houses {side}")
    num = 24
    widths = 7 + 9 * random.random(num) + 5 * scene.urban
    gaps = np.where(random.random(num) < 0.12 + 0.6 * (1 - scene.urban) ** 1.5, 3 + 32 * random.random(num), 0.0)
    starts = np.concatenate([[0.0], np.cumsum(widths + gaps * (1.4 - scene.urban))[:-1]])
    starts += -starts[-1] * (0.35 + 0.3 * random.random())
    storeys = np.maximum(1, np.round(scene.storeys * (0.4 + 1.2 * random.random(num))))
    place = scene.place
    shade = 0.86 + 0.24 * random.random((num, 1))
    other = np.array([[222.0, 214.0, 200.0], [168.0, 160.0, 152.0], [196.0, 150.0, 120.0]])[random.integers(0, 3, num)]
    share = np.where(random.random((num, 1)) < 0.22, 0.75, 0.08)
    shapes = np.searchsorted(np.cumsum(place.roofs)[:2], random.random(num))
    flat = (shapes == 1) | (storeys > 5)
    return {
        "start": starts,
        "stop": starts + widths,
        "height": storeys * _STOREY_M + 0.4,
        "rise": np.where(flat, 0.7, np.where(shapes == 0, 3.6, 2.8)),
        "slope": np.where(flat, 0.0, np.where(shapes == 0, 1.0, 0.5)),
        "wall": np.clip(place.wall * shade * (1 - share) + share * other, 0, 255),
        "shop": (random.random(num) < 0.9 * scene.urban - 0.15).astype(float),
        "roof": np.clip(place.roof * (0.9 + 0.2 * random.random((num, 1))), 0, 255),
    }


def _meet_houses(scene: Scene, view: Rays) -> dict[str, Floats]:
    """What each column meets: (W,) distance, height, roof; (W, 3) colours; distance is inf where nothing stands."""
    relative = view.azimuth + math.radians(scene.heading_deg - scene.road_bearing_deg)
    sine, cosine = np.sin(relative), np.cos(relative)
    size = len(relative)
    met: dict[str, Floats] = {name: np.zeros(size) for name in ("height", "roof_top", "frame", "glass", "shop")}
    met |= {"distance": np.full(size, np.inf), "wall": np.zeros((size, 3)), "roof": np.zeros((size, 3))}
    sun = math.radians(scene.sun_azimuth_deg - scene.road_bearing_deg)
    sunny = (1 - 0.8 * scene.cloudiness) * math.cos(math.radians(scene.sun_elevation_deg))
    for sign, side in ((1.0, "right"), (-1.0, "left")):
        row = _house_row(scene, side)
        setback = setback_m(scene) - sign * scene.camera_lateral_m
        columns = np.flatnonzero(sine * sign > 1e-3)
        along = setback * cosine[columns] / (sine[columns] * sign)
        house = np.clip(np.searchsorted(row["start"], along, side="right") - 1, 0, len(row["start"]) - 1)
        front = (along >= row["start"][house]) & (along < row["stop"][house])
        forward = cosine[columns] > 0
        # In a gap the line of sight may still meet the end wall of the next house away from the camera.
        after = np.clip(np.where(forward, np.searchsorted(row["start"], along), house), 0, len(row["start"]) - 1)
        edge = np.where(forward, row["start"][after], row["stop"][after])
        lateral = edge * np.tan(relative[columns]) * sign
        end = ~front & (edge * cosine[columns] > 0) & (lateral > setback) & (lateral < setback + 9)
        seen = (front | end) & (np.abs(np.where(front, along, edge)) < _STREET_M)
        columns, along, house, front, edge, lateral, forward = (
            part[seen] for part in (columns, along, np.where(front, house, after), front, edge, lateral, forward)
        )
        met["distance"][columns] = np.where(front, setback / np.abs(sine[columns]), edge / cosine[columns])
        met["height"][columns] = row["height"][house]
        width = row["stop"][house] - row["start"][house]
        position = np.where(front, (along - row["start"][house]) / width, (lateral - setback) / 9)
        fall = np.abs(2 * position - 1) * row["slope"][house]
        met["roof_top"][columns] = row["height"][house] + row["rise"][house] * np.where(
            front, np.clip(2.2 * (1 - fall), 0, 1), np.where(row["slope"][house] > 0, 1 - np.abs(2 * position - 1), 1)
        )
        phase = (position * np.where(front, np.maximum(2, np.round(width / 3.0)), 2.0)) % 1
        met["glass"][columns] = np.abs(phase - 0.5) < 0.22
        met["shop"][columns] = row["shop"][house] * front * (np.abs(position - 0.5) < 0.42)
        met["frame"][columns] = np.abs(phase - 0.5) < 0.28
        facing = np.where(front, -sign * math.sin(sun), np.where(forward, -1.0, 1.0) * math.cos(sun))
        shade = 0.80 + 0.08 * front + 0.26 * sunny * np.maximum(facing, 0)
        met["wall"][columns] = row["wall"][house] * shade[:, None]
        met["roof"][columns] = row["roof"][house] * (0.4 + 0.6 * shade[:, None])
    return met


def draw_houses(canvas: Floats, scene: Scene, view: Rays) -> None:
    """All houses on both sides, with windows and roofs."""
    met = _meet_houses(scene, view)
    distance = np.where(np.isfinite(met["distance"]), met["distance"], 1e6)
    top = np.where(np.isfinite(met["distance"]), np.maximum(met["roof_top"], met["height"]), -1.0)
    highest = float(np.max((top - CAMERA_HEIGHT_M) / distance))
    lowest = float(np.max(CAMERA_HEIGHT_M / distance))
    rows = np.flatnonzero((view.pitch < math.atan(highest) + 0.02) & (view.pitch > -math.atan(lowest) - 0.02))
    if highest <= 0 or len(rows) == 0:
        return
    band = slice(rows[0], rows[-1] + 1)
    tangent = np.tan(view.pitch[band])
    up = np.multiply.outer(tangent, distance).astype(np.float32) + np.float32(CAMERA_HEIGHT_M)
    # Rows covered per metre turn heights into soft edges.
    per_metre = (1 / (distance * math.pi / len(view.pitch))).astype(np.float32)
    height = met["height"].astype(np.float32)
    storey = up * np.float32(1 / _STOREY_M)
    storey -= np.floor(storey)
    window = (np.abs(storey - np.float32(0.55)) < 0.24) & (met["glass"] > 0) & (up < height - 0.3)
    wall = np.clip((height - up) * per_metre + 0.5, 0, 1)
    wall *= (up > 0) & (distance < 1e5)
    roof = np.clip((met["roof_top"].astype(np.float32) - up) * per_metre + 0.5, 0, 1)
    roof *= (up > height) & (distance < 1e5)
    eaves = (up > height - 0.25) & (up <= height)
    frame = (np.abs(storey - np.float32(0.55)) < 0.29) & (met["frame"] > 0) & (up < height - 0.3)
    frame &= ~window
    awning = (up > 2.5) & (up < 3.3) & (met["shop"] > 0)
    soot = np.clip(np.float32(0.80) + np.float32(0.05) * up, 0, 1)
    fog = (np.clip(distance / 420, 0, 0.4) * (0.4 + 0.6 * scene.haze)).astype(np.float32)
    glass = 0.45 * scene.sky[0] + np.array([14.0, 16.0, 20.0])
    for channel in range(3):
        plane = canvas[channel, band]
        air = np.float32(scene.sky[1, channel])
        walls = met["wall"][:, channel].astype(np.float32)
        walls += fog * (air - walls)
        roofs = met["roof"][:, channel].astype(np.float32)
        roofs += fog * (air - roofs)
        colour = np.where(window, np.float32(glass[channel]) + fog * (air - np.float32(glass[channel])), walls)
        colour *= soot
        colour += np.float32(0.5) * frame * (244 - colour)
        if met["shop"].any():
            colour += np.float32(0.85) * awning * (np.float32(scene.roadside.accent[channel]) - colour)
        colour *= 1 - np.float32(0.22) * eaves
        plane += wall * (colour - plane)
        plane += roof * (roofs - plane)


def _stand(
    canvas: Floats, scene: Scene, view: Rays, sprite: Floats, at: tuple[float, float], size: tuple[float, float],
    *, lift: float = 0.0,
) -> None:  # fmt: skip
    """Put a sprite of (width, height) metres at (ahead, lateral) metres from the camera, `lift` above the ground."""
    distance = max(math.hypot(*at), 1.5)
    azimuth = math.atan2(at[1], at[0]) + math.radians(scene.road_bearing_deg - scene.heading_deg)
    per_radian = view.width / (2 * math.pi)
    column = (azimuth + math.pi) * per_radian % view.width
    middle = len(view.pitch) / 2
    top = middle - math.atan((lift + size[1] - CAMERA_HEIGHT_M) / distance) * per_radian
    bottom = middle - math.atan((lift - CAMERA_HEIGHT_M) / distance) * per_radian
    width = 2 * math.atan(size[0] / 2 / distance) * per_radian
    fog = np.append(scene.sky[1], min(distance / 300, 0.5) * (0.4 + 0.6 * scene.haze)).astype(np.float32)
    paste(canvas, sprite, column, (top, bottom), width, fog)


def _shade(canvas: Floats, scene: Scene, view: Rays, at: tuple[float, float], width: float) -> None:
    """Darken the ground under a thing of `width` metres."""
    distance = math.hypot(*at)
    per_radian = view.width / (2 * math.pi)
    azimuth = math.atan2(at[1], at[0]) + math.radians(scene.road_bearing_deg - scene.heading_deg)
    near, far = max(distance - width / 2, 1.0), distance + width / 2
    rows = [len(view.pitch) / 2 + math.atan(CAMERA_HEIGHT_M / reach) * per_radian for reach in (far, near)]
    column = (azimuth + math.pi) * per_radian % view.width
    spread = 2.4 * math.atan(width / 2 / distance) * per_radian
    paste(canvas, shadow(), column, (rows[0], rows[1]), spread, np.zeros(4, np.float32))


def _bar(colour: Any) -> Floats:
    """A one-pixel sprite: stretched, it is a post."""
    return np.asarray(colour, np.float32).reshape(3, 1, 1)


def draw_objects(canvas: Floats, scene: Scene, view: Rays) -> None:
    """Landmark, trees, poles and wires, posts, the sign and the cars, roughly from far to near."""
    random, roadside, place = scene.random("objects"), scene.roadside, scene.place
    here, half = scene.camera_lateral_m, scene.road_half_width_m
    own = -1.0 if roadside.drives_left else 1.0
    _draw_trees(canvas, scene, view)

    pole_side = 1.0 if random.random() < 0.5 else -1.0
    lateral = pole_side * (half + 1.6) - here
    offset = 34 * random.random()
    for number in sorted(range(-3, 4), key=lambda k: -abs(k * 34 - 17 + offset)):
        ahead = number * 34 - 17 + offset
        _stand(canvas, scene, view, _bar(roadside.pole), (ahead, lateral), (0.42, 8.5))
        for arm in range(roadside.pole_arms):
            _stand(canvas, scene, view, _bar(roadside.pole), (ahead, lateral), (2.8, 0.3), lift=7.9 - 0.9 * arm)
    relative = view.azimuth + math.radians(scene.heading_deg - scene.road_bearing_deg)
    for wire in range(roadside.num_wires):
        columns = np.flatnonzero(np.sin(relative) * np.sign(lateral) > 0.02)
        climb = (8.2 - 0.45 * wire - CAMERA_HEIGHT_M) * np.abs(np.sin(relative[columns])) / abs(lateral)
        rows = (len(view.pitch) / 2 - np.arctan(climb) * view.width / (2 * math.pi)).astype(np.intp)
        canvas[:, rows, columns] *= 0.45

    lean = [post * 9.0 + 4.5 for post in range(-4, 4)]
    for ahead in sorted(lean, key=abs, reverse=True):
        for edge in (-1.0, 1.0):
            at = (ahead, edge * (half + 0.7) - here)
            _stand(canvas, scene, view, _bar(roadside.bollard[0]), at, (0.32, 1.1))
            _stand(canvas, scene, view, _bar(roadside.bollard[1]), at, (0.34, 0.34), lift=0.66)

    # The sign stands on the side of the traffic it addresses, so it is read in the direction of travel only.
    ahead = 8.5 + 3 * random.random()
    at = (ahead, own * (half + 2.3) - here)
    board = sign_board(roadside, random)
    for foot in (-1.2, 1.2):
        _stand(canvas, scene, view, _bar((120, 122, 126)), (at[0], at[1] + foot), (0.2, 2.4))
    _stand(canvas, scene, view, board, at, (5.2, 3.4), lift=1.9)

    paints = np.array([[236, 236, 238], [36, 38, 44], [150, 154, 160], [168, 30, 36], [40, 74, 136]], np.float32)
    order = [(16 + 22 * random.random(), own, True), (-8 - 10 * random.random(), own, False),
             (12 + 20 * random.random(), -own, False), (-9 - 14 * random.random(), -own, True)]  # fmt: skip
    for ahead, lane, rear in order:
        paint = paints[random.integers(0, 5)]
        if random.random() < 0.45 + 0.3 * scene.urban:
            picture = car(paint * (0.95 if place.snow < 0.5 else 1.0), roadside.plate, rear=rear)
            at = (ahead, lane * half / 2 - here)
            _shade(canvas, scene, view, at, 2.6)
            _stand(canvas, scene, view, picture, at, (1.9, 1.55))


def _draw_trees(canvas: Floats, scene: Scene, view: Rays) -> None:
    """Trees of the region beside the road, and the one landmark behind them, far to near."""
    random, place = scene.random("trees"), scene.place
    here, half, front = scene.camera_lateral_m, scene.road_half_width_m, setback_m(scene)
    chance = np.cumsum(place.trees / place.trees.sum())[:-1]
    kinds = [TREE_KINDS[k] for k in np.searchsorted(chance, random.random(3))]
    bare = place.snow * 0.2
    pictures = [tree(kind, place.vegetation * (0.8 + 0.35 * random.random()) * (1 - bare)) for kind in kinds]
    num = int((6 + 20 * (1 - place.dryness) ** 1.2) * (1.15 - 0.75 * scene.urban))
    ahead = 110 * random.random(num) - 55
    spread = 1.6 + (1.4 + 22 * (1 - scene.urban) ** 2) * random.random(num) ** 1.5
    if scene.urban > 0.42:
        spread = np.minimum(spread, front - half - 0.8)
    lateral = np.where(random.random(num) < 0.5, 1, -1) * (half + spread) - here
    tall = {"C": 11.0, "B": 8.0, "P": 10.0, "A": 6.5, "S": 2.2, "Y": 11.0, "E": 12.0}
    stretch = 0.7 + 0.6 * random.random(num)
    broad = {"C": 0.42, "B": 0.85, "P": 0.7, "A": 1.7, "S": 1.3, "Y": 0.5, "E": 0.8}
    which = random.integers(0, 3, num)
    angle = 360 * random.random()
    if scene.urban < 0.42:
        _stand_landmark(canvas, scene, view, angle)
    for index in np.argsort(-np.hypot(ahead, lateral)):
        if math.hypot(ahead[index], lateral[index]) > 4.5:
            kind = kinds[which[index]]
            height = tall[kind] * stretch[index]
            place_at = (float(ahead[index]), float(lateral[index]))
            _shade(canvas, scene, view, place_at, broad[kind] * height)
            _stand(canvas, scene, view, pictures[which[index]], place_at, (broad[kind] * height, height))


def _stand_landmark(canvas: Floats, scene: Scene, view: Rays, angle: float) -> None:
    """The special building, at one bearing only."""
    picture = landmark(scene.roadside.landmark, scene.place.wall, scene.roadside.accent)
    turn = math.radians(angle)
    _stand(canvas, scene, view, picture, (42 * math.cos(turn), 42 * math.sin(turn)), (15, 22))
