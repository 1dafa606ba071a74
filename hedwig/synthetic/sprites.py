"""Flat cut-outs that stand in the street: trees, cars, landmarks, drawn by formulas into small arrays.

A sprite is `(4, N, N)`: red, green, blue in [0, 255] and coverage in [0, 1]. The masks are computed once per process;
a colour is laid over them for each panorama. `paste` puts one onto the canvas, over the seam where needed. No image
files, no fonts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["car", "landmark", "paste", "shadow", "tree"]

Floats = NDArray[Any]

_SIDE = 144
_TRUNK = np.array([92.0, 70.0, 50.0], np.float32)


def _grid(side: int = _SIDE) -> tuple[Floats, Floats]:
    """Coordinates (N, N): x in [-1, 1] to the right, y in [0, 1] upwards."""
    steps = (np.arange(side, dtype=np.float32) + 0.5) / side
    return np.broadcast_to(2 * steps - 1, (side, side)), np.broadcast_to(1 - steps[:, None], (side, side))


def _soft(distance: Floats, width: float = 0.04) -> Floats:
    """Coverage of a shape from its signed distance (positive inside)."""
    return np.clip(distance / width + 0.5, 0, 1)


@lru_cache(maxsize=1)
def _leaf_noise() -> Floats:
    """Rough texture (N, N), about -1 to 1."""
    random = np.random.Generator(np.random.PCG64(7))
    white = random.standard_normal((2, _SIDE, _SIDE))
    fine, coarse = (ndimage.gaussian_filter(white[k], sigma, mode="wrap") for k, sigma in enumerate((1.0, 4.5)))
    noise = 0.45 * fine / fine.std() + 0.45 * coarse / coarse.std()
    return np.asarray(np.clip(noise, -1, 1), np.float32)


@lru_cache(maxsize=16)
def _tree_masks(kind: str) -> tuple[Floats, Floats, Floats]:
    """Crown coverage, crown tone (about 0.6 to 1.2) and trunk coverage of one kind, (N, N) each."""
    x, y = _grid()
    noise = _leaf_noise()
    trunk = _soft(np.minimum(0.05 - np.abs(x), 0.5 - y))
    if kind == "C":  # conifer: tiers that widen downwards
        tier = 0.5 + 0.5 * ((y * 6) % 1)
        crown = _soft(np.minimum(0.72 * (1.02 - y) * (1.25 - 0.45 * tier) + 0.05 * noise - np.abs(x), y - 0.08))
    elif kind == "P":  # palm: curved trunk, fronds as hanging arcs
        bend = 0.14 * (y - 0.5)
        trunk = _soft(np.minimum(0.045 - np.abs(x - bend), 0.84 - y))
        angle, radius = np.arctan2(y - 0.82, (x - 0.06) * 0.5), np.hypot((x - 0.06) * 0.5, y - 0.82)
        droop = np.abs(np.sin(4.5 * angle + 5 * radius))
        crown = _soft(np.minimum(0.38 - radius, 0.24 - np.abs(droop - 0.7) + 0.2 - 0.55 * radius))
    elif kind == "A":  # umbrella acacia
        crown = _soft(0.98 - np.abs(x) ** 2 - ((y - 0.78) / 0.17) ** 2 + 0.25 * noise, 0.2)
        trunk = _soft(np.minimum(0.04 + 0.25 * np.clip(y - 0.45, 0, 1) - np.abs(np.abs(x) - 0.5 * y**2), 0.72 - y))
    elif kind == "S":  # shrub
        crown = _soft(0.95 - x**2 - ((y - 0.25) / 0.7) ** 2 + 0.5 * noise, 0.3)
    elif kind == "Y":  # cypress, poplar
        crown = _soft(0.30 * np.sqrt(np.clip(np.sin(np.pi * np.clip(y * 0.92 + 0.08, 0, 1)), 0, 1)) + 0.06 * noise
                      - np.abs(x))  # fmt: skip
    elif kind == "E":  # eucalypt: pale trunk, separate tufts
        tufts = [(0.0, 0.86, 0.30), (-0.42, 0.66, 0.28), (0.44, 0.72, 0.30), (0.14, 0.56, 0.22)]
        inside = np.max([r**2 - (x - cx) ** 2 - (1.6 * (y - cy)) ** 2 for cx, cy, r in tufts], axis=0)
        crown = _soft(inside + 0.05 * noise, 0.05)
        trunk = _soft(np.minimum(0.06 - np.abs(x - 0.1 * np.sin(5 * y)), 0.8 - y))
    else:  # broadleaf
        crown = _soft(0.92 - x**2 - ((y - 0.62) / 0.38) ** 2 + 0.35 * noise, 0.2)
    tone = 0.86 + 0.24 * noise + 0.42 * (y - 0.5) + 0.14 * x
    return crown, np.clip(tone, 0.45, 1.3), np.clip(trunk, 0, 1)


def tree(kind: str, leaves: Floats) -> Floats:
    """A tree of one of `climate.TREE_KINDS` with leaves of colour (3,)."""
    crown, tone, trunk = _tree_masks(kind)
    bark = _TRUNK * (2.1 if kind == "E" else 1.0)
    colour = np.asarray(leaves, np.float32)[:, None, None] * tone * 0.86
    colour = np.where(crown > 0.3, colour, bark[:, None, None])
    return np.concatenate([colour, np.maximum(crown, trunk)[None]]).astype(np.float32)


@lru_cache(maxsize=1)
def shadow() -> Floats:
    """A soft dark patch, (4, 32, 32), to lie on the ground under things."""
    x, y = _grid(32)
    coverage = 0.42 * np.clip(1.25 - 1.25 * (x**2 + (2 * y - 1) ** 2), 0, 1)
    return np.concatenate([np.full((3, 32, 32), 26.0), coverage[None]]).astype(np.float32)


def car(body: Floats, plate: tuple[Any, Any], *, rear: bool) -> Floats:
    """A car from behind (red lamps) or from the front (white lamps), with a large number plate."""
    x, y = _grid(64)
    canvas = np.zeros((4, 64, 64), np.float32)

    def draw(mask: Floats, colour: Any) -> None:
        canvas[:3] += mask * (np.asarray(colour, np.float32)[:, None, None] - canvas[:3])
        canvas[3] = np.maximum(canvas[3], mask)

    draw(_soft(np.minimum(0.9 - np.abs(x), 0.2 - y)), (24, 24, 26))
    draw(_soft(np.minimum(0.72 + 0.25 * (0.55 - y) - np.abs(x), np.minimum(y - 0.1, 0.96 - y))), body)
    draw(_soft(np.minimum(0.62 + 0.2 * (0.6 - y) - np.abs(x), np.minimum(y - 0.58, 0.9 - y))), (52, 62, 74))
    lamp = _soft(np.minimum(0.14 - np.abs(np.abs(x) - 0.66), 0.07 - np.abs(y - 0.44)))
    draw(lamp, (214, 24, 28) if rear else (255, 252, 226))
    draw(_soft(np.minimum(0.34 - np.abs(x), 0.09 - np.abs(y - 0.26))), plate[0])
    letters = (np.abs(x) < 0.27) & (np.abs(y - 0.26) < 0.05) & ((np.floor((x + 1) * 12) % 2) == 0)
    draw(letters.astype(np.float32), plate[1])
    return canvas


def landmark(kind: int, wall: Floats, accent: Any) -> Floats:
    """The one special building: 0 steeple, 1 dome with minarets, 2 pagoda, 3 silo, 4 slab tower, 5 onion tower."""
    x, y = _grid()
    side = np.abs(x)
    body, top = np.zeros_like(x), np.zeros_like(x)
    if kind == 0:
        body = np.maximum(_soft(np.minimum(0.22 - side, 0.62 - y)), _soft(np.minimum(0.75 - side, 0.3 - y)))
        top = _soft(np.minimum(0.26 * (1 - (y - 0.6) / 0.4) - side, y - 0.6))
    elif kind == 1:
        towers = np.minimum(0.07 - np.abs(side - 0.82), 0.86 - y)
        body = np.maximum(_soft(np.minimum(0.66 - side, 0.4 - y)), _soft(towers))
        top = np.maximum(_soft(0.29 - x**2 - (1.35 * (y - 0.42)) ** 2), _soft(np.minimum(0.1 - np.abs(side - 0.82),
                         0.06 - np.abs(y - 0.88))))  # fmt: skip
    elif kind == 2:
        tier = (y * 4) % 1
        body = _soft(np.minimum(0.62 - 0.4 * np.floor(y * 4) / 4 - side, 0.96 - y))
        top = _soft(
            np.minimum(0.98 - 0.62 * np.floor(y * 4) / 4 - 0.5 * (tier - 0.55) - side, 0.22 - np.abs(tier - 0.77))
        )
    elif kind == 3:
        body = _soft(np.minimum(0.42 - np.abs(side - 0.46), 0.74 - y))
        top = _soft(0.17 - (side - 0.46) ** 2 - (1.6 * (y - 0.74)) ** 2)
    elif kind == 4:
        body = _soft(np.minimum(0.5 - side, 0.98 - y))
        top = body * ((y * 9) % 1 < 0.4)
    else:
        body = _soft(np.minimum(0.3 - side, 0.56 - y))
        bulb = 0.38 * np.sqrt(np.clip(np.sin(np.pi * np.clip((y - 0.52) / 0.36, 0, 1)), 0, 1)) * (1.1 - (y - 0.5))
        top = np.maximum(_soft(np.minimum(bulb - side, y - 0.52)), _soft(np.minimum(0.035 - side, y - 0.8)))
    shade = 0.92 + 0.14 * x
    colour = np.asarray(wall, np.float32)[:, None, None] * shade
    colour = colour + (top > 0.4) * (np.asarray(accent, np.float32)[:, None, None] * shade - colour)
    return np.concatenate([colour, np.maximum(body, top)[None]]).astype(np.float32)


def paste(canvas: Floats, sprite: Floats, column: float, rows: tuple[float, float], width: float, fog: Floats) -> None:
    """Lay a sprite over the canvas, in place.

    Args:
        canvas: (3, H, W), [0, 255].
        sprite: (4, N, M) colour and coverage, or (3, N, M) for full coverage.
        column: column of the sprite's centre, any real number; it wraps around.
        rows: top and bottom row, fractional.
        width: columns covered.
        fog: (4,) colour of the air and how much of it lies between, [0, 1].
    """
    _, height, total = canvas.shape
    first, last = max(0, round(rows[0])), min(height, round(rows[1]))
    left, right = round(column - width / 2), round(column + width / 2)
    right = min(max(right, left + 1), left + total)
    if last <= first:
        return
    picked_rows = ((np.arange(first, last) + 0.5 - rows[0]) / (rows[1] - rows[0]) * sprite.shape[1]).astype(np.intp)
    picked_columns = ((np.arange(left, right) + 0.5 - left) / (right - left) * sprite.shape[2]).astype(np.intp)
    np.clip(picked_rows, 0, sprite.shape[1] - 1, out=picked_rows)
    patch = sprite.take(picked_rows, axis=1).take(picked_columns, axis=2)
    if fog[3] > 0:
        patch[:3] += fog[3] * (fog[:3, None, None] - patch[:3])
    shift = left // total * total
    pieces = [(left - shift, min(right - shift, total), 0)]
    if right - shift > total:
        pieces.append((0, right - shift - total, total - (left - shift)))
    for start, stop, skip in pieces:
        region = canvas[:, first:last, start:stop]
        piece = patch[:, :, skip : skip + stop - start]
        if len(piece) == 3:
            region[...] = piece
        else:
            region += piece[3] * (piece[:3] - region)
