import math

import numpy as np
import pytest

from hedwig import geo


def slow_distance_km(lat1, lon1, lat2, lon2):
    """The angle between two unit vectors, by atan2: another formula, good at all angles."""
    a, b = geo.unit_vectors(lat1, lon1), geo.unit_vectors(lat2, lon2)
    return 6371.0088 * math.atan2(np.linalg.norm(np.cross(a, b)), float(a @ b))


def test_haversine_agrees_with_the_angle_between_vectors():
    rng = np.random.default_rng(0)
    points = np.column_stack([np.degrees(np.arcsin(rng.uniform(-1, 1, 200))), rng.uniform(-180, 180, 200)])
    for (lat1, lon1), (lat2, lon2) in zip(points[:100], points[100:], strict=True):
        assert geo.haversine_km(lat1, lon1, lat2, lon2) == pytest.approx(slow_distance_km(lat1, lon1, lat2, lon2))


def test_haversine_at_its_ends():
    assert geo.haversine_km(48.1, 11.5, 48.1, 11.5) == 0.0
    assert geo.haversine_km(0, 0, 0, 180) == pytest.approx(math.pi * 6371.0088)
    assert geo.haversine_km(90, 13, 90, -77) == pytest.approx(0, abs=1e-6)  # the pole has any longitude
    assert geo.haversine_km(0, 179.5, 0, -179.5) == pytest.approx(111.19, abs=0.01)


def test_haversine_broadcasts_and_known_city_pair():
    assert geo.haversine_km([[0], [10]], 0, 0, [0, 10, 20]).shape == (2, 3)
    assert geo.haversine_km(48.8566, 2.3522, 40.7128, -74.0060) == pytest.approx(5837, abs=2)  # Paris - New York


def test_unit_vectors_and_back():
    lat, lon = np.array([0.0, 90.0, -45.0]), np.array([0.0, 0.0, -170.0])
    assert np.allclose(geo.unit_vectors(lat, lon)[:2], [[1, 0, 0], [0, 0, 1]])
    back_lat, back_lon = geo.lat_lon(3.7 * geo.unit_vectors(lat, lon))
    assert np.allclose(back_lat, lat)
    assert np.allclose(back_lon, lon)


def test_spherical_mean_crosses_the_antimeridian():
    lat, lon = geo.spherical_mean([10, 10], [179, -179])
    assert abs(lon) == pytest.approx(180)
    assert lat == pytest.approx(10.0, abs=0.01)  # a planar mean would answer 0°E, half a world away
    assert geo.spherical_mean([0, 0], [0, 90], weights=[1, 0])[1] == pytest.approx(0)


def test_spherical_mean_refuses_what_has_none():
    with pytest.raises(ValueError, match="no points"):
        geo.spherical_mean([], [])
    with pytest.raises(ValueError, match="cancel out"):
        geo.spherical_mean([0, 0], [0, 180])


def test_chords():
    km = np.array([0.0, 1.0, 500.0, 20015.0])
    assert np.allclose(geo.chord_to_km(geo.km_to_chord(km)), km)
    chord = np.linalg.norm(geo.unit_vectors(10, 20) - geo.unit_vectors(12, 25))
    assert geo.chord_to_km(chord) == pytest.approx(float(geo.haversine_km(10, 20, 12, 25)))


def test_equal_earth_known_values_and_equal_area():
    x, y = geo.equal_earth([0, 90, 0], [180, 0, 0])
    assert x[0] == pytest.approx(2.7066, abs=1e-4)
    assert y[1] == pytest.approx(1.3173, abs=1e-4)
    assert (x[2], y[2]) == (0, 0)

    def cell_area(lat):  # 1° x 1° quadrilateral by the shoelace formula
        xs, ys = geo.equal_earth([lat, lat, lat + 1, lat + 1], [0, 1, 1, 0])
        return abs(np.dot(xs, np.roll(ys, -1)) - np.dot(ys, np.roll(xs, -1))) / 2

    for lat in (0, 30, 60, 85):
        true_area = math.radians(1) * (math.sin(math.radians(lat + 1)) - math.sin(math.radians(lat)))
        assert cell_area(lat) == pytest.approx(true_area, rel=2e-3)
