"""One panorama as numbers: a row of the listing becomes everything that the drawing needs.

The position gives nature, the country code the roadside, the date the season; the chance (hour, weather, road
bearing, lens) comes from the panorama's identifier alone. So a row always gives the same picture, in any order and on
any worker, and nothing here knows about pixels.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedwig.synthetic.climate import Nature, nature, smooth_field, sun_position
from hedwig.synthetic.countries import Country, country, stable_random

__all__ = ["CAMERA_HEIGHT_M", "Scene", "scene_of"]

CAMERA_HEIGHT_M = 2.4
_UNKNOWN_POPULATION = 20_000


@dataclass(frozen=True)
class Scene:
    """What to draw; angles in degrees clockwise from north, lengths in metres, colours (3,) sRGB in [0, 255].

    Attributes:
        key: text that seeds the layout of objects.
        heading_deg: direction of the centre column.
        place: nature at the position.
        roadside: style of the country.
        sun_elevation_deg: of the sun, at least 3.
        sun_azimuth_deg: of the sun.
        cloudiness: 0 clear, 1 overcast.
        haze: 0 clear, 1 thick.
        sky: colours at the zenith and at the horizon, (2, 3).
        light: colour gain of the whole picture, (3,).
        road_bearing_deg: direction of travel.
        road_half_width_m: from the centre line to the edge.
        paved: False on earth roads.
        urban: 0 open country, 1 city of millions.
        storeys: usual number of storeys.
    """

    key: str
    heading_deg: float
    place: Nature
    roadside: Country
    sun_elevation_deg: float
    sun_azimuth_deg: float
    cloudiness: float
    haze: float
    sky: NDArray[Any]
    light: NDArray[Any]
    road_bearing_deg: float
    road_half_width_m: float
    paved: bool
    urban: float
    storeys: float

    @property
    def camera_lateral_m(self) -> float:
        """Where the camera stands, to the right of the centre line: in the middle of its own lane."""
        return self.road_half_width_m / 2 * (-1 if self.roadside.drives_left else 1)

    def random(self, part: str) -> np.random.Generator:
        """The chance of one part of the picture; parts do not disturb each other."""
        return stable_random(part, self.key)


def _day_of_year(captured_at: Any) -> int:
    """Day 1 to 366 of an ISO date; 15 April where there is none (neither summer nor winter)."""
    if not isinstance(captured_at, str) or not captured_at:
        return 105
    try:
        return datetime.date.fromisoformat(captured_at[:10]).timetuple().tm_yday
    except ValueError as error:
        raise ValueError(f"captured_at is {captured_at!r}; write an ISO date such as 2021-07-14.") from error


def scene_of(row: Mapping[str, Any]) -> Scene:
    """The scene of a row with `pano_id`, `lat`, `lon`, `heading`, and if known `country`, `captured_at`, `population`.

    Raises:
        ValueError: position or heading are missing or no finite numbers, or the date is none.
    """
    numbers = {name: row.get(name) for name in ("lat", "lon", "heading")}
    if any(value is None or not math.isfinite(value) for value in numbers.values()):
        raise ValueError(f"Panorama {row.get('pano_id')!r} has {numbers}; drawing needs finite lat, lon and heading.")
    lat, lon, heading = (float(value) for value in numbers.values() if value is not None)
    key = str(row["pano_id"])
    code = row.get("country")
    roadside = country(code if isinstance(code, str) else "")
    population = row.get("population")
    people = float(population) if population is not None and math.isfinite(population) else _UNKNOWN_POPULATION
    day = _day_of_year(row.get("captured_at"))
    place = nature(lat, lon, day)

    draw = stable_random("scene", key).random(16)
    elevation, azimuth = sun_position(lat, day, 9.5 + 5 * draw[0])
    cloudiness = float(np.clip(1.25 * draw[1] ** (1 + 1.5 * place.dryness) - 0.1, 0, 1))
    haze = float(np.clip(0.15 + 0.3 * draw[2] + 0.25 * place.dryness + 0.15 * (place.temperature_c > 24), 0, 1))
    axes = np.array([[-0.9, 0.5, 0.1], [0.9, 0.9, 0.6], [0.3, 0.1, -0.9]])  # cool, bright, warm: no violet
    tint = 1.1 * axes.T @ [float(smooth_field(f"sky {k}", lat, lon, wavelength_km=9000)) for k in "abc"]
    dusty = np.array([222.0, 196.0, 150.0])
    clear = np.array([[62.0, 122.0, 200.0], [176.0, 206.0, 228.0]]) + np.array([[17.0], [13.0]]) * tint
    clear[1] += 0.5 * place.dryness * (dusty - clear[1])
    milky = np.array([204.0, 212.0, 216.0])
    clear[0] += 0.4 * haze * (milky - clear[0])
    grey = np.array([[158.0, 164.0, 172.0], [206.0, 208.0, 208.0]]) + 9 * tint
    sky = clear + 0.8 * max(0.0, cloudiness - 0.45) / 0.55 * (grey - clear)

    low = float(np.clip((18 - elevation) / 18, 0, 1)) * (1 - cloudiness)
    exposure = (0.90 + 0.20 * draw[3]) * (1 - 0.16 * low - 0.08 * cloudiness)
    balance = 1 + 0.05 * (draw[4:7] - 0.5)
    light = exposure * balance * (1 + low * np.array([0.10, -0.02, -0.16]))
    urban = float(np.clip((math.log10(people + 1) - 3.2) / 3.3 + 0.3 * (draw[7] - 0.5), 0, 1))
    paved = not (roadside.edge_line is None and urban < 0.35 and draw[8] < 0.5)
    return Scene(
        key=key,
        heading_deg=heading,
        place=place,
        roadside=roadside,
        sun_elevation_deg=max(elevation, 3.0),
        sun_azimuth_deg=azimuth,
        cloudiness=cloudiness,
        haze=haze,
        sky=sky,
        light=light,
        road_bearing_deg=360 * float(draw[9]),
        road_half_width_m=3.4 + 1.2 * urban + 0.4 * float(draw[10]),
        paved=paved,
        urban=urban,
        storeys=1.0 + 7.0 * urban**2 * (0.5 + float(draw[11])),
    )
