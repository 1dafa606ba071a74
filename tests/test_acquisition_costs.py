"""Estimates: the requests of each service, money only where a price is known, and time at the rate."""

from __future__ import annotations

import pytest

from hedwig.acquisition.costs import SERVICES, estimate


def test_the_papers_districts_on_street_view():
    told = estimate(7830, "streetview", headings=8, requests_per_s=10)
    assert (told.num_lookups, told.num_images, told.num_requests) == (7830, 62_640, 70_470)
    assert told.cost_usd == 438.48  # lookups are free
    assert told.time_s == 7047.0
    assert "listed before March 2025" in told.text()
    assert told.record()["num_requests"] == 70_470


def test_a_given_price_and_share_take_the_place_of_the_kept_ones():
    told = estimate(1000, "streetview", headings=4, price_per_1000=5.6, found_share=0.25)
    assert (told.num_lookups, told.num_panoramas, told.num_images, told.cost_usd) == (1000, 250, 1000, 5.6)
    assert "the price given" in told.text()


@pytest.mark.parametrize("source", ["mapillary", "panoramax"])
def test_open_sources_give_one_image_per_panorama(source):
    told = estimate(100, source, headings=8, found_share=0.5)
    assert (told.num_images, told.num_lookups, told.cost_usd) == (50, 150, 0.0)


def test_an_unknown_price_is_unknown_and_not_zero():
    told = estimate(10, "elsewhere", headings=2)
    assert told.usd_per_1000 is None
    assert told.cost_usd is None
    assert "unknown; give --price-per-1000" in told.text()
    assert estimate(10, "elsewhere", headings=2, price_per_1000=1.0).cost_usd == 0.02


def test_every_price_says_where_it_was_read():
    for service in SERVICES.values():
        assert service.listed_at
        assert (service.usd_per_1000 > 0) == bool(service.read_at)


@pytest.mark.parametrize("bad", [{"headings": 0}, {"requests_per_s": 0}, {"found_share": 1.5}, {"price_per_1000": -1}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        estimate(1, "streetview", **bad)
