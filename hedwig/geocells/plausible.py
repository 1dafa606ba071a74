"""Does a table of positions make sense on the Earth, or has it latitude and longitude in each other's column?

No single row can tell: (9, 48) is a fine place in Ethiopia and (48, 9) one in Germany. A whole table can: street
panoramas lie near places and in the country that their row names, and they do not when the columns are swapped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedwig.geocells.geography import Geography

__all__ = ["plausible_share", "refuse_swapped"]

LEAST_ROWS = 5
NEAR_KM = 100.0  # of street-level panoramas, nine in ten lie within 25 km of a GeoNames place
SAMPLE = 2000


def plausible_share(lat: ArrayLike, lon: ArrayLike, country: Sequence[str | None], geography: Geography) -> float:
    """Share of (N,) positions in degrees that are in range, near a place and, where named, in the named country."""
    lats, lons = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    possible = (np.abs(lats) <= 90) & (np.abs(lons) <= 180)
    if not possible.any():
        return 0.0
    found = geography.lookup(lats[possible], lons[possible])
    named = [name for name, fits in zip(country, possible, strict=True) if fits]
    agree = [name is None or len(name) != 2 or name.upper() == c for name, c in zip(named, found.country, strict=True)]
    good: NDArray[np.bool_] = (found.place_km <= NEAR_KM) & np.array(agree)
    return float(good.sum()) / len(lats)


def refuse_swapped(lat: ArrayLike, lon: ArrayLike, country: Sequence[str | None], geography: Geography) -> None:
    """Raise ValueError when the table is implausible as it is and plausible with its two columns exchanged.

    Args:
        lat: (N,) degrees as given, in range or not; rows without a position left out.
        lon: (N,) degrees as given.
        country: ISO 3166-1 alpha-2 codes where the rows have them.
        geography: where places and countries are.
    """
    lats, lons = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    if len(lats) < LEAST_ROWS:
        return
    rows = np.unique(np.linspace(0, len(lats) - 1, min(SAMPLE, len(lats))).astype(int))
    names = [country[i] for i in rows]
    as_given = plausible_share(lats[rows], lons[rows], names, geography)
    if as_given >= 0.5:
        return
    exchanged = plausible_share(lons[rows], lats[rows], names, geography)
    if exchanged > 0.8:
        raise ValueError(
            f"lat and lon look swapped: as given, {as_given:.0%} of {len(rows)} rows lie near a place (and in the "
            f"country they name); exchanged, {exchanged:.0%} do. The first row has lat={lats[0]}, lon={lons[0]}. "
            "Rename the columns."
        )
