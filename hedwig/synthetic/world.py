"""Where the synthetic panoramas stand: real places, drawn so that no country is missing and none drowns the rest.

`World.rows` gives the listing (position, heading, date, country, file name) that a real source would give; the
picture is made from such a row by `hedwig.synthetic.render`. The first rows of a longer listing are the shorter
listing. The identifiers are opaque: neither they nor the file names tell the position.
"""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hedwig.geo import EARTH_RADIUS_KM, lat_lon, unit_vectors
from hedwig.synthetic.countries import stable_random

__all__ = ["World"]

_COLUMNS = ("lat", "lon", "country", "population")
_FIRST_DAY = datetime.date(2014, 1, 1)
_NUM_DAYS = 4018  # 2014-01-01 to 2024-12-31


class World:
    """A procedural Earth of panoramas at the places of a table.

    Args:
        places: one row per place: `lat`, `lon` in degrees, `country` ISO 3166-1 alpha-2, `population`; further
            columns are ignored. `hedwig.geocells.geography.Geography.default().places()` is such a table.
        seed: another seed draws other places, headings and dates on the same Earth.

    Raises:
        ValueError: a column is missing, the table is empty, or a position is not finite.
    """

    def __init__(self, places: pd.DataFrame, seed: int) -> None:
        missing = [column for column in _COLUMNS if column not in places]
        if missing:
            raise ValueError(
                f"The table of places lacks {missing}; it has {list(places.columns)}. Pass lat, lon, country and "
                "population."
            )
        self.seed = int(seed)
        self._lat = places["lat"].to_numpy(np.float64)
        self._lon = places["lon"].to_numpy(np.float64)
        if len(places) == 0 or not (np.isfinite(self._lat).all() and np.isfinite(self._lon).all()):
            raise ValueError(f"The table of {len(places)} places is empty or has positions that are not finite.")
        self._country = places["country"].fillna("").astype(str).to_numpy()
        self._population = np.maximum(places["population"].fillna(0).to_numpy(np.float64), 0)
        self._log_weights = np.log(self._weights())

    def _weights(self) -> NDArray[np.float64]:
        """Chance of each place, (P,): its country's population^0.4, shared by population^0.3 inside the country."""
        people = self._population + 500
        inside = people**0.3
        _, number = np.unique(self._country, return_inverse=True)
        country = np.bincount(number, weights=people) ** 0.4 / np.bincount(number, weights=inside)
        return np.asarray(inside * country[number])

    def rows(self, num: int, *, width: int = 1024) -> pd.DataFrame:
        """The listing of the first `num` panoramas.

        Args:
            num: how many; every place is used once before any is used again.
            width: pixels of the images, even; the height is half of it.

        Returns:
            A frame with `pano_id`, `lat`, `lon`, `heading` (degrees from north of the centre column), `projection`,
            `captured_at` (ISO date), `country`, `sequence` (one per place), `image_uri`, `source`, `licence`,
            `width`, `height`, `population` (of the place; it decides how high the buildings are).

        Raises:
            ValueError: `num` is negative or `width` is no positive even number.
        """
        if num < 0:
            raise ValueError(f"num is {num}; ask for zero or more panoramas.")
        if width < 2 or width % 2:
            raise ValueError(f"width is {width}; an equirectangular image needs an even width of at least 2.")
        chosen = self._order(num)
        draw = stable_random("world", self.seed).random((num, 4))
        lat, lon = self._jitter(chosen, draw[:, 0], draw[:, 1])
        ids = [f"synth-{self.seed}-{index:06d}" for index in range(num)]
        days = (draw[:, 3] * _NUM_DAYS).astype(int)
        columns: dict[str, Any] = {
            "pano_id": ids,
            "lat": lat,
            "lon": lon,
            "heading": np.round(draw[:, 2] * 360, 2) % 360,
            "projection": "equirectangular",
            "captured_at": [(_FIRST_DAY + datetime.timedelta(days=int(day))).isoformat() for day in days],
            "country": self._country[chosen],
            "sequence": [f"synth-{self.seed}-s{stable_random('sequence', self.seed, i).integers(2**40):010x}"
                         for i in chosen],
            "image_uri": [f"images/{pano_id}.jpg" for pano_id in ids],
            "source": "hedwig synthetic world",
            "licence": "CC0-1.0",
            "width": width,
            "height": width // 2,
            "population": self._population[chosen].astype(np.int64),
        }  # fmt: skip
        return pd.DataFrame(columns, index=pd.RangeIndex(num))

    def _order(self, num: int) -> NDArray[np.int64]:
        """Places (num,) in the order they are drawn: weighted, without replacement within a round.

        Sorting by log weight + Gumbel noise draws without replacement (Efraimidis & Spirakis 2006), and makes a
        shorter listing the beginning of a longer one.
        """
        size = len(self._lat)
        rounds = []
        for number in range(-(-num // size)):
            uniform = stable_random("round", self.seed, number).random(size)
            rounds.append(np.argsort(-(self._log_weights - np.log(-np.log(uniform + 1e-300))), kind="stable"))
        return np.concatenate([*rounds, np.empty(0, np.int64)])[:num].astype(np.int64)

    def _jitter(
        self, chosen: NDArray[np.int64], radius: NDArray[np.float64], angle: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Positions (N,), (N,) in degrees, spread over a disc of 1 to 8 km, larger for larger places."""
        reach_km = np.clip((self._population[chosen] + 1) ** 0.25 / 4, 1, 8)
        tangent = np.sqrt(radius)[:, None] * reach_km[:, None] / EARTH_RADIUS_KM
        centre = unit_vectors(self._lat[chosen], self._lon[chosen])
        east = unit_vectors(np.zeros(len(chosen)), self._lon[chosen] + 90)
        turn = 2 * np.pi * angle[:, None]
        lat, lon = lat_lon(centre + tangent * (np.cos(turn) * east + np.sin(turn) * np.cross(centre, east)))
        return np.round(lat, 6), np.round(lon, 6)
