"""Everything that has no thickness: sky with sun and clouds, mountains, the far tree line, the ground with its road.

The canvas is planar, `(3, H, W)` float32 in [0, 255], so that each operation runs over contiguous memory. The ground
is not painted but looked up: its colour depends on the distance from the centre line, on whether a dash is painted and
on a patch of grass, so one table of blurred cross sections serves every pixel; the blur is the row's footprint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hedwig.synthetic.scene import CAMERA_HEIGHT_M, Scene

__all__ = ["Rays", "draw_ground", "draw_horizon", "draw_sky", "rays"]

Floats = NDArray[Any]

_STEP_M = 0.04  # resolution of the cross section
_REACH_M = 20.0  # the cross section is constant beyond
_NUM_BLURS = 14


@dataclass(frozen=True)
class Rays:
    """Geometry and textures that depend on the width alone; angles in radians.

    Attributes:
        width: columns W; there are W/2 rows.
        azimuth: (W,) of the columns, clockwise from the centre column.
        pitch: (H,) of the rows, upwards.
        ground_distance: (H/2,) metres to the ground, rows below the horizon.
        ahead: (H/2, W) metres on the ground towards the centre column's heading.
        right: (H/2, W) metres on the ground to its right.
        blur: (H/2,) intp, level of the cross section.
        clouds: (2, H/2, W) noise about -1 to 1, seamless.
        earth: (H/2, W) noise about -1 to 1, seamless.
        grain: (H, W) sensor noise, standard deviation 1.
    """

    width: int
    azimuth: Floats
    pitch: Floats
    ground_distance: Floats
    ahead: Floats
    right: Floats
    blur: NDArray[np.intp]
    clouds: Floats
    earth: Floats
    grain: Floats


def _fractal(side: int, random: np.random.Generator, power: float) -> Floats:
    """Periodic noise (side, side) with a power-law spectrum, standard deviation 0.5."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij"))
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(random.standard_normal((side, side))) * frequency**-power
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, s=(side, side))
    return np.asarray(noise / (2 * noise.std()))


@lru_cache(maxsize=4)
def rays(width: int) -> Rays:
    """Geometry of an equirectangular image of `width` columns, cached for the last four widths."""
    if width < 32 or width % 2:
        raise ValueError(f"width is {width}; draw at an even width of at least 32 pixels.")
    height, half = width // 2, width // 2 - width // 4
    azimuth = (np.arange(width) + 0.5) / width * 2 * math.pi - math.pi
    pitch = math.pi / 2 - (np.arange(height) + 0.5) / height * math.pi
    distance = CAMERA_HEIGHT_M / np.tan(-pitch[height - half :].clip(max=-0.25 * math.pi / height))
    footprint = 1.2 * distance * 2 * math.pi / width
    random = np.random.Generator(np.random.PCG64(11))

    def seen(noise: Floats, radius: Floats, scale: float) -> Floats:
        rows = radius[:, None] * np.cos(azimuth) * scale
        columns = radius[:, None] * np.sin(azimuth) * scale
        return np.asarray(ndimage.map_coordinates(noise, [rows, columns], order=1, mode="grid-wrap"), np.float32)

    up = pitch[: height - half].clip(min=0.5 * math.pi / height)
    flat = 1 / (np.tan(up) + 0.10)  # 0.10: the layer bends down towards the horizon
    fade = np.clip(np.sin(up) * 4, 0, 1).astype(np.float32)[:, None]
    clouds = [seen(_fractal(512, random, 1.7), flat, 70.0) * fade for _ in range(2)]
    earth = seen(_fractal(512, random, 1.0), np.minimum(distance, 60), 14.0)
    return Rays(
        width=width,
        azimuth=azimuth,
        pitch=pitch,
        ground_distance=distance,
        ahead=(distance[:, None] * np.cos(azimuth)).astype(np.float32),
        right=(distance[:, None] * np.sin(azimuth)).astype(np.float32),
        blur=np.clip(np.round(2 * np.log2(footprint / _STEP_M)), 0, _NUM_BLURS - 1).astype(np.intp),
        clouds=np.stack(clouds),
        earth=earth * np.clip(12 / distance, 0.15, 1)[:, None].astype(np.float32),
        grain=random.standard_normal((height, width), dtype=np.float32),
    )


def draw_sky(canvas: Floats, scene: Scene, view: Rays) -> None:
    """Gradient, glow and disc of the sun, clouds; fills the rows above the horizon."""
    rows = len(view.pitch) - len(view.ground_distance)
    pitch = view.pitch[:rows]
    elevation = math.radians(scene.sun_elevation_deg)
    turn = view.azimuth + math.radians(scene.heading_deg - scene.sun_azimuth_deg)
    cosine = np.multiply.outer(np.cos(pitch) * math.cos(elevation), np.cos(turn)).astype(np.float32)
    cosine += (np.sin(pitch) * math.sin(elevation)).astype(np.float32)[:, None]
    away = np.maximum(1.0001 - cosine, 0)  # 0 at the sun, 2 opposite
    sunny = 1 - 0.92 * scene.cloudiness**2
    glow = sunny * (0.018 / (away + 0.018) + 0.22 * np.maximum(1 - away, 0))
    glow += sunny * np.clip(3 - away * 1600, 0, 1)  # the disc, 3.3° wide so that it survives at 64 pixels
    np.minimum(glow, 1, out=glow)
    upwards = 1 - np.clip(np.sin(pitch), 0, 1) ** (0.55 + 0.3 * (1 - scene.haze))
    draw = scene.random("clouds").random(3)
    cover = np.roll(view.clouds[int(draw[0] * 2)], int(draw[1] * view.width), axis=1)
    cover = np.clip((cover + 1.5 * scene.cloudiness - 0.95) * 1.8, 0, 0.92)
    warm = np.clip((20 - scene.sun_elevation_deg) / 20, 0, 1)
    sun = np.array([255.0, 246 - 40 * warm, 222 - 100 * warm])
    shade = 0.80 + 0.35 * np.clip(1 - scene.cloudiness, 0, 1)
    bright = np.minimum(255, np.array([238.0, 240.0, 244.0]) * shade)
    for band in range(3):
        column = scene.sky[0, band] + (scene.sky[1, band] - scene.sky[0, band]) * upwards
        plane = canvas[band, :rows]
        plane[:] = column.astype(np.float32)[:, None]
        plane += cover * (np.float32(bright[band]) - plane)
        plane += glow * (np.float32(sun[band]) - plane)


def _ridge(angle: Floats, random: np.random.Generator, waves: tuple[int, ...]) -> Floats:
    """Periodic rough curve over the azimuth, about 0 to 1."""
    phases = random.random(len(waves)) * 2 * math.pi
    curve = sum(
        np.abs(np.sin(k * angle / 2 + phase)) / (1 + k / waves[0]) for k, phase in zip(waves, phases, strict=True)
    )
    return np.asarray(curve) / sum(1 / (1 + k / waves[0]) for k in waves)


def _fill_below(canvas: Floats, view: Rays, top: Floats, colour: Floats) -> None:
    """Fill each column from the elevation `top` (W,) radians down to the horizon; `colour` (3,) or (3, W)."""
    horizon = len(view.pitch) - len(view.ground_distance)
    per_row = math.pi / len(view.pitch)
    first = max(0, horizon - math.ceil(max(float(top.max()), 0.0) / per_row) - 1)
    if first >= horizon:
        return
    cover = np.clip((top[None] - view.pitch[first:horizon, None]) / per_row + 0.5, 0, 1).astype(np.float32)
    for band in range(3):
        plane = canvas[band, first:horizon]
        plane += cover * (np.asarray(colour[band], np.float32) - plane)


def draw_horizon(canvas: Floats, scene: Scene, view: Rays) -> None:
    """Mountains on the side where the relief rises, and the far line of trees, both faded by the air."""
    place, random = scene.place, scene.random("horizon")
    north = view.azimuth + math.radians(scene.heading_deg)
    air = scene.sky[1]
    rock = 0.45 * place.soil + 0.45 * place.vegetation
    if place.relief > 0.25:
        facing = np.cos(north - math.radians(place.relief_azimuth_deg))
        amplitude = 0.9 * (place.relief - 0.12)
        for layer, (distance, strength) in enumerate(((0.48, 1.0), (0.28, 0.55))):
            window = np.clip(0.25 + 0.75 * facing if layer == 0 else 0.6 + 0.4 * facing, 0.02, 1)
            top = amplitude * strength * window * _ridge(north, random, (4, 9, 17, 31, 64)) ** 1.3
            colour = rock * 0.75 + (distance + 0.25 * scene.haze) * (air * 0.86 - rock * 0.75)
            _fill_below(canvas, view, top, colour)
            cold = float(np.clip((14 - place.temperature_c) / 14, 0, 1))
            if layer == 0 and cold > 0.15:
                cap = np.array([238.0, 242.0, 248.0])
                for band in range(3):
                    lifted = 0.6 * colour[band] + 0.4 * cap[band]
                    _cap(canvas[band], view, top, amplitude * (0.62 - 0.4 * cold), lifted)
    wet = 1 - place.dryness
    top = 0.012 + 0.085 * wet * _ridge(north, random, (14, 25, 47, 90)) * (1 - 0.4 * scene.urban)
    leaves = place.vegetation * 0.68
    _fill_below(canvas, view, top, leaves + (0.2 + 0.25 * scene.haze) * (air * 0.8 - leaves))


def _cap(plane: Floats, view: Rays, top: Floats, line: float, colour: float) -> None:
    """Snow between the elevation `line` and the ridge `top`, in place on one band (H, W)."""
    rows = np.flatnonzero((view.pitch > line) & (view.pitch < float(top.max())))
    if len(rows):
        region = plane[rows[0] : rows[-1] + 1]
        covered = view.pitch[rows[0] : rows[-1] + 1, None] < top[None]
        region[covered] = colour


def _cross_sections(scene: Scene) -> Floats:
    """Colours across the road, (3, 4 states, levels, positions): states are dash + 2 · grass."""
    place, roadside = scene.place, scene.roadside
    lateral = np.arange(-_REACH_M, _REACH_M, _STEP_M)
    side, half = np.abs(lateral), scene.road_half_width_m
    grass = place.vegetation * 0.94
    pavement = 0.6 * np.array([176.0, 174.0, 170.0]) + 0.4 * place.wall
    asphalt = 104.0 + roadside.asphalt + 0.22 * (place.soil - 104.0) if scene.paved else place.soil * 0.96
    asphalt = asphalt + 0.5 * place.snow * (np.array([206.0, 210.0, 216.0]) - asphalt)
    built = scene.urban > 0.42
    table = np.empty((4, len(lateral), 3))
    for state in range(4):
        dash, green = state % 2, state // 2
        section = np.where((side < half)[:, None], asphalt, grass if green else place.soil)
        beside = (side >= half) & (side < half + (2.6 if built else 1.1))
        section[beside] = pavement if built else 0.7 * place.soil + 0.3 * asphalt
        if built:
            section[(side >= half) & (side < half + 0.18)] = pavement * 0.72
        if scene.paved:
            if roadside.centre_solid:
                section[np.abs(side - 0.22) < 0.11] = roadside.centre_line
            elif dash:
                section[side < 0.13] = roadside.centre_line
            if roadside.edge_line is not None and (dash or not roadside.edge_dashed):
                section[np.abs(side - half + 0.35) < 0.12] = roadside.edge_line
        else:
            section[np.abs(side - 0.5 * half) < 0.35] *= 0.86
        table[state] = section
    sums = np.pad(np.cumsum(np.pad(table, ((0, 0), (64, 64), (0, 0)), mode="edge"), axis=1), ((0, 0), (1, 0), (0, 0)))
    levels = []
    for level in range(_NUM_BLURS):
        reach = min(64, round(2 ** (level / 2) / 2))
        start = 64 - reach + np.arange(len(lateral))
        levels.append((sums[:, start + 2 * reach + 1] - sums[:, start]) / (2 * reach + 1))
    return np.ascontiguousarray(np.stack(levels, axis=1).transpose(3, 0, 1, 2), np.float32)


def draw_ground(canvas: Floats, scene: Scene, view: Rays) -> None:
    """The road with its paint, pavement or verge, soil and grass; fills the rows below the horizon."""
    rows = len(view.ground_distance)
    table = _cross_sections(scene)
    size = table.shape[-1]
    turn = math.radians(scene.road_bearing_deg - scene.heading_deg)
    sine, cosine = np.float32(math.sin(turn)), np.float32(math.cos(turn))
    lateral = view.right * cosine
    lateral -= view.ahead * sine
    lateral += np.float32(scene.camera_lateral_m + _REACH_M)
    lateral *= np.float32(1 / _STEP_M)
    np.clip(lateral, 0, size - 1, out=lateral)
    index = lateral.astype(np.int32)
    index += (view.blur * size).astype(np.int32)[:, None]
    draw = scene.random("ground").random(2)
    noise = np.roll(view.earth, int(draw[0] * view.width), axis=1)
    along = view.ahead * cosine
    along += view.right * sine
    along *= np.float32(1 / 9)
    along += np.float32(draw[1])
    along -= np.floor(along)
    index += (along < 0.45) * np.int32(_NUM_BLURS * size)
    index += (noise < np.float32(1.7 * (0.62 - scene.place.dryness))) * np.int32(2 * _NUM_BLURS * size)
    gain = 1 + np.float32(0.075) * noise
    mist = np.clip((view.ground_distance - 25) / 260, 0, 0.5) * (0.4 + 0.6 * scene.haze)
    fade = mist.astype(np.float32)[:, None]
    for band in range(3):
        plane = table[band].ravel().take(index)
        plane *= gain
        plane += fade * (np.float32(scene.sky[1, band]) - plane)
        canvas[band, -rows:] = plane
