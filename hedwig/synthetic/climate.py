"""What nature looks like at a position: soil, plants, walls and roofs as smooth functions on the sphere.

Sixty-odd anchors with colours of the real regions are blended by a von Mises-Fisher kernel of about 1,000 km, so
neighbouring places look alike and continents differ; random plane waves add variation inside a region, and
temperature and season follow simple formulas of latitude, continentality and day. No file, no seed: the same Earth
for every world. It is a toy (not a climatology); only the order of things is right (deserts are dry, taiga is cold).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedwig.geo import EARTH_RADIUS_KM, unit_vectors

__all__ = ["TREE_KINDS", "Nature", "nature", "smooth_field", "sun_position"]

Floats = NDArray[Any]

TREE_KINDS = "CBPASYE"  # conifer, broadleaf, palm, acacia, shrub, cypress, eucalypt
_KERNEL_SHARPNESS = 45.0  # 1 / radian²: a standard deviation of 0.149 rad, about 950 km

# lat lon | soil vegetation wall roof | dryness continentality relief (0-9 each) | trees | roof: Gable Flat Hip
_REGIONS = """
 64 -150 6b6558 3f5a3c 8a5a3a 4c4f55 2 7 7 CC G | 48 -122 5b4a38 1f5a35 8f9a98 4a4f4c 1 3 8 CC G
 35 -117 c9a877 8a8f4a e8c9a0 c2744a 8 4 7 PS H | 41 -100 a98d5c a3a04f d8d2c0 6a6058 5 8 2 BB G
 28 -101 c08a5a 8a8c45 e0a060 d8b48a 7 5 5 SS F | 33  -84 a8532f 3f7a2f b5583f 55504e 2 4 3 BC G
 42  -74 77664d 4a7d35 9c4434 5c5350 2 6 4 BB G | 49  -68 6a6050 35603f c8ccd0 3f6a78 1 8 3 CC G
 53 -108 4f463a 93a04a d0c8a8 5a6a5a 4 9 1 CB G | 17  -95 9a5a3c 3f8a3a e87a4a b5492f 3 2 7 PB H
 19  -73 c9b58a 3f9a4a 5fc0b8 d0604a 3 1 5 PP G |  5  -74 8a5030 2f8c4a f0d080 a8482f 1 1 9 BP H
 -5  -61 b0522c 157a2c d8a878 b86a3c 0 0 0 BP G | -9  -39 cf7a45 7a9a3a f0b850 c8643a 6 1 3 SP H
-22  -46 b8442a 3f8f35 f0e0c0 c8542f 2 2 5 BP H |-15  -71 a88a68 9a9450 b07a55 8a5a40 7 3 9 SS F
-38  -70 8c7a64 6f7a55 c8b070 9a3f38 5 3 9 YC G |-33  -60 6f5a3c 86b045 e0d8c8 b09a88 3 4 0 BY F
 53   -4 5a4a38 4f9a3f a8584a 5a4a48 0 1 4 BB G | 40   -4 c89a5a 8f8f48 f0e6d0 cf6a3c 7 5 6 YS H
 47    3 8f7a55 62983a e6d8b4 98583f 2 4 3 BY G | 50   13 7a6548 4c8a35 e8d088 b8402f 2 5 4 BC G
 42   16 b58f62 70803c eec890 d0582f 5 4 7 YB H | 62   16 6f6a60 2f5f38 a03028 33363c 1 6 5 CC G
 50   32 332a22 7fa83f c0d0d8 7f8c94 3 7 1 BY G | 56   44 544a40 4f8640 b8a8d0 3f7a58 2 8 1 CB G
 56   72 4a4238 78944a 7098c0 4a5a98 3 9 0 CB G | 58  110 6a6458 2f5540 6a4a38 8090a0 3 9 6 CC G
 50  134 5c5048 3f6f48 d8b8b0 4868a8 2 8 6 CB G | 39   36 b8a078 8a8a50 e8b898 b84a38 5 6 8 YS H
 33    2 c8824f 7a7a3c f4ece0 d0a888 7 4 6 PS F | 22   10 e8b870 a08a48 d89858 c89058 9 5 3 SP F
 28   31 d8b888 4a8a38 c8a070 a88a68 9 4 1 PP F | 12   -3 c8602f a09a3c b86a40 a8a8a8 7 4 0 AS F
  6    4 b8401f 2a8a38 e8c078 8a4030 2 1 1 PB H |  0   20 a03c20 0f6a2a c09068 a86848 0 0 2 BP G
  9   41 c88a50 8a9a50 d0a890 98a0a8 6 3 8 AA G | -3   36 b8482a 88a848 d8c8b8 b84038 4 1 6 AB G
-28   26 b06a3c a89a48 d8b890 787068 6 4 5 AE G |-15   32 b85030 98983c c87850 c0c0b8 5 3 3 AA G
-19   47 b83818 88a050 b85838 d8a060 3 2 6 PA G | 24   46 e6cc94 98a058 f4e6c8 e0c8a0 9 5 3 PS F
 33   54 c4a884 8a9860 d8b478 b8986c 8 7 8 YS F | 42   66 b8aa80 90a070 e0dcd4 7090a8 7 9 5 YY G
 28   72 d0b48c 7c983c c88860 a87860 8 5 1 AB F | 25   85 a89468 58a030 e0a8a0 b07860 3 4 1 BP F
 13   78 b05428 4a9a2c 78c8d0 c85838 4 1 3 PB F | 31   90 8a7a68 8c9060 f0f0ec a83c3c 6 7 9 CS F
 41   85 d4c0a0 88946c d8a878 c0a080 9 9 7 YS F | 37  114 b49868 7c9850 b8a090 707880 5 7 4 YB H
 25  112 94482c 2f8a48 d8dcd8 586068 1 3 6 BB H | 46  108 a89468 a0a860 f0f0e8 3058a8 7 9 4 SC G
 37  127 a0804c 3c7a3c e8e4dc 2f68b0 2 5 7 CB H | 36  138 60503c 2c7848 c0c0b8 405068 1 3 8 CB H
 16  102 b8683c 48a838 f0c8b0 c85020 3 2 2 PB G |  2  108 b8602c 0c8040 f0dca0 a83c28 0 0 4 PP H
 -8  115 6c4428 30983c e8b0a0 cc4c24 2 0 8 PP H | 13  122 7c5838 3ca448 b8d8a0 50a078 1 0 7 PP G
-18  134 d04c1c 98983c d8d8c0 c8ccd0 8 4 1 EA G |-35  146 b08040 96a060 c07850 8a5040 5 3 3 EE H
-31  117 c86830 80885c f0e4cc b4b8b8 7 3 1 EE G | -7  146 7c3820 188034 a89068 a0a8a8 0 0 8 PB G
-41  174 6c6444 5cb040 f0f0f0 b03830 1 1 8 CY G | 65  -20 3c3a3c 84a058 f0f0f4 c83030 2 2 7 SS G
-17 -178 8c5030 40b048 a8e0e0 4890c8 1 0 6 PP G | 20 -157 703828 48a040 e0d8b8 688c70 2 0 8 PP H
"""


@dataclass(frozen=True)
class Nature:
    """The look of a position on one day; colours are (3,) sRGB in [0, 255].

    Attributes:
        soil: bare ground, snow included.
        vegetation: leaves and grass of that day.
        wall: usual wall of the region.
        roof: usual roof of the region.
        snow: share of the ground under snow, 0 to 1.
        dryness: 0 (rain forest) to 1 (desert).
        relief: height of the mountains on the horizon, 0 to 1.
        relief_azimuth_deg: where they stand, clockwise from north (the uphill direction of the relief field).
        temperature_c: temperature of the day, degrees Celsius.
        trees: (7,) probabilities of `TREE_KINDS`.
        roofs: (3,) probabilities of gable, flat and hip.
    """

    soil: Floats
    vegetation: Floats
    wall: Floats
    roof: Floats
    snow: float
    dryness: float
    relief: float
    relief_azimuth_deg: float
    temperature_c: float
    trees: Floats
    roofs: Floats


@lru_cache(maxsize=1)
def _regions() -> tuple[Floats, Floats]:
    """Unit vectors (R, 3) and attributes (R, 25): 4 colours, 3 numbers, 7 tree and 3 roof probabilities."""
    vectors, attributes = [], []
    for entry in _REGIONS.replace("\n", "|").split("|"):
        if not entry.strip():
            continue
        lat, lon, *words = entry.split()
        vectors.append(unit_vectors(float(lat), float(lon)))
        colours = [channel for word in words[:4] for channel in bytes.fromhex(word)]
        numbers = [int(word) / 9 for word in words[4:7]]
        trees = [words[7].count(kind) / len(words[7]) for kind in TREE_KINDS]
        attributes.append([*colours, *numbers, *trees, *(float(words[8] == shape) for shape in "GFH")])
    return np.array(vectors), np.array(attributes)


@lru_cache(maxsize=64)
def _plane_waves(name: str, wavelength_km: float) -> tuple[Floats, Floats]:
    """Wave vectors (24, 3) and phases (24,) of one field; fixed by its name, never by a seed."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    random = np.random.Generator(np.random.PCG64(key))
    directions = random.standard_normal((24, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    length = 2 * math.pi * EARTH_RADIUS_KM / wavelength_km * random.uniform(0.6, 1.4, (24, 1))
    return directions * length, random.uniform(0, 2 * math.pi, 24)


def smooth_field(name: str, lat: Any, lon: Any, *, wavelength_km: float = 4000.0) -> Floats:
    """A fixed smooth random function on the sphere, about standard normal, of the shape of `lat`.

    The sum of 24 plane waves in space restricted to the sphere (random Fourier features: Rahimi & Recht 2007), so
    there is no seam at 180° and no pinching at the poles.
    """
    waves, phases = _plane_waves(name, wavelength_km)
    return np.asarray(np.cos(unit_vectors(lat, lon) @ waves.T + phases).sum(axis=-1) / math.sqrt(12.0))


def sun_position(lat: float, day: int, hour: float) -> tuple[float, float]:
    """Elevation and azimuth of the sun in degrees, azimuth clockwise from north.

    Args:
        lat: latitude in degrees.
        day: day of the year, 1 to 366.
        hour: true solar time, 12 is noon.

    Declination after Cooper (1969); the rest is spherical trigonometry.
    """
    declination = math.radians(23.45) * math.sin(2 * math.pi * (284 + day) / 365)
    phi, angle = math.radians(lat), math.radians(15 * (hour - 12))
    up = math.sin(phi) * math.sin(declination) + math.cos(phi) * math.cos(declination) * math.cos(angle)
    east = -math.cos(declination) * math.sin(angle)
    north = math.cos(phi) * math.sin(declination) - math.sin(phi) * math.cos(declination) * math.cos(angle)
    return math.degrees(math.asin(max(-1.0, min(1.0, up)))), math.degrees(math.atan2(east, north)) % 360


def nature(lat: float, lon: float, day: int) -> Nature:
    """The look of (lat, lon) on a day of the year."""
    vectors, table = _regions()
    cosine = vectors @ unit_vectors(lat, lon)
    weights = np.exp(_KERNEL_SHARPNESS * (cosine - cosine.max()))
    values = (weights / weights.sum()) @ table
    soil, vegetation, wall, roof = values[:12].reshape(4, 3)
    dryness, continental = np.clip(values[12:14] + 0.06 * smooth_field("dry", lat, lon, wavelength_km=2500), 0, 1)

    offsets = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])  # degrees: the slope of the relief by differences
    relief = 1.6 * (values[14] - 0.22) + 0.05 * smooth_field(
        "relief", lat + offsets[:, 0], lon + offsets[:, 1], wavelength_km=2500
    )
    uphill = math.degrees(math.atan2(relief[2] - relief[0], relief[1] - relief[0])) % 360

    # Annual mean and swing: 27.5 °C on the equator, -2.5 °C at 60°; continents swing up to ±24 °C.
    sine = math.sin(math.radians(lat))
    swing = (2 + 22 * abs(sine) ** 1.2) * (0.5 + 0.6 * continental) * math.copysign(1.0, lat)
    season = math.cos(2 * math.pi * (day - 200) / 365)
    temperature = 27.5 - 40 * sine * sine - 6 * float(np.clip(relief[0], 0, 1)) * (abs(lat) > 35) + swing * season
    snow = float(np.clip((0.0 - temperature) / 8, 0, 1))

    # Brown grass below 8 °C and, outside the wet tropics, in the dry half of the year (summer rains below 30°).
    wet_season = season * math.copysign(1.0, lat) * (1 if abs(lat) < 32 else -0.6)
    straw = np.array([176.0, 150.0, 84.0])
    brown = 0.55 * np.clip((8 - temperature) / 14, 0, 1) * (1 - values[15]) + 0.3 * dryness * np.clip(-wet_season, 0, 1)
    ripple = np.array([smooth_field(name, lat, lon) for name in ("red", "green", "blue")])
    vegetation = vegetation + np.clip(brown, 0, 0.6) * (straw - vegetation) + 7 * ripple
    white = np.array([236.0, 240.0, 246.0])
    soil = soil + 9 * np.roll(ripple, 1)
    return Nature(
        soil=np.clip(soil + 0.72 * snow * (white - soil), 0, 255),
        vegetation=np.clip(vegetation + 0.35 * snow * (white - vegetation), 0, 255),
        wall=np.clip(wall + 8 * np.roll(ripple, 2), 0, 255),
        roof=np.clip(roof - 8 * ripple + 0.45 * snow * (white - roof), 0, 255),
        snow=snow,
        dryness=float(dryness),
        relief=float(np.clip(relief[0], 0, 1)),
        relief_azimuth_deg=uphill,
        temperature_c=float(temperature),
        trees=values[15:22],
        roofs=values[22:25],
    )
