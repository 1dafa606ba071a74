import numpy as np
import pytest

from hedwig.geocells import Geography, refuse_swapped
from hedwig.geocells.plausible import plausible_share


@pytest.fixture(scope="module")
def geography():
    return Geography.default()


@pytest.fixture(scope="module")
def towns(geography):
    return geography.places().sample(400, random_state=0)


def test_real_places_are_plausible_and_swapped_ones_are_not(geography, towns):
    lat, lon, country = towns["lat"].to_numpy(), towns["lon"].to_numpy(), towns["country"].tolist()
    assert plausible_share(lat, lon, country, geography) > 0.95
    assert plausible_share(lon, lat, country, geography) < 0.1
    refuse_swapped(lat, lon, country, geography)
    with pytest.raises(ValueError, match=r"lat and lon look swapped: as given, [0-9]% of 400 rows"):
        refuse_swapped(lon, lat, country, geography)


def test_the_range_is_not_needed_to_see_it(geography, towns):
    german = towns[(towns["country"] == "DE")]
    lat, lon = german["lat"].to_numpy(), german["lon"].to_numpy()
    assert (np.abs(lon) <= 90).all()
    with pytest.raises(ValueError, match="look swapped"):
        refuse_swapped(lon, lat, ["DE"] * len(lat), geography)


def test_a_world_table_without_countries_is_enough(geography, towns):
    with pytest.raises(ValueError, match="look swapped"):
        refuse_swapped(towns["lon"], towns["lat"], [None] * len(towns), geography)


def test_some_wild_rows_and_tiny_tables_are_no_swap(geography):
    refuse_swapped([95.0, 96.0, 48.1], [1.0, 1.0, 11.5], [None] * 3, geography)
    lat = np.array([48.1, 50.1, 52.5, 53.5, 95.0, 120.0])
    refuse_swapped(lat, np.array([11.6, 8.7, 13.4, 10.0, 1.0, 2.0]), [None] * 6, geography)
    refuse_swapped(np.full(50, -40.0), np.linspace(-140, -120, 50), [None] * 50, geography)  # ships in the Pacific
