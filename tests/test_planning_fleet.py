import json
import math

import pytest

from hedwig.planning import GPUS, Fleet, Rates, clips_per_s_of, limits_of, node_fleet, outlook, simulate


def rates(**changes):
    settings = {"bytes_in": 350_000.0, "bytes_out": 6_500.0, "decode_s": 0.010, "overhead_s": 0.0025}
    return Rates(**{**settings, "clips_per_s": 300.0, "overlapped": True, **changes})


def test_decode_cores_that_feed_one_accelerator():
    """300 clips/s at 12.5 ms of CPU each keep 3.75 cores busy; the bandwidth is 105 MB/s."""
    limits = limits_of(rates(), Fleet(num_gpus=1, cores_per_gpu=16))
    assert limits.cores_needed_per_gpu == pytest.approx(3.75)
    assert limits.storage_needed == pytest.approx(105e6)
    assert (limits.bottleneck, limits.rows_per_s) == ("accelerator", 300.0)


@pytest.mark.parametrize(
    ("rate_changes", "fleet_changes", "bottleneck", "rows_per_s"),
    [
        ({}, {"cores_per_gpu": 2}, "decode", 8 * 160),
        ({}, {"storage_bytes_per_s": 350e6}, "storage", 1000),
        ({}, {}, "accelerator", 2400),
        # One after the other: 1 / (1/300 + 0.0125/4) of each of eight.
        ({"overlapped": False}, {"cores_per_gpu": 4}, "accelerator", 8 / (1 / 300 + 0.0125 / 4)),
        ({"overlapped": False}, {"cores_per_gpu": 3}, "decode", 8 / (1 / 300 + 0.0125 / 3)),
    ],
)
def test_the_bottleneck_is_what_allows_least(rate_changes, fleet_changes, bottleneck, rows_per_s):
    limits = limits_of(rates(**rate_changes), Fleet(**{"num_gpus": 8, **fleet_changes}))
    assert limits.bottleneck == bottleneck
    assert limits.rows_per_s == pytest.approx(rows_per_s)


def test_time_cost_and_bytes():
    told = outlook(rates(), Fleet(num_gpus=8, startup_s=60, price_per_hour=3.0), 8_640_000)
    assert told.seconds == pytest.approx(60 + 3600)
    assert told.gpu_hours == pytest.approx(8 * 3660 / 3600)
    assert told.cost == pytest.approx(told.gpu_hours * 3)
    assert (told.bytes_read, told.bytes_written) == (8_640_000 * 350_000, 8_640_000 * 6_500)
    assert told.preemptions == 0
    assert outlook(rates(), Fleet(num_gpus=8), 10).cost is None


def test_the_arithmetic_agrees_with_the_simulation():
    fleet = Fleet(
        num_gpus=64, startup_s=90, provision_s=180, preemptions_per_hour=0.5, price_per_hour=2.0, block_rows=2048
    )
    told = outlook(rates(), fleet, 100_000_000)
    outcomes = [simulate(node_fleet(rates(), fleet), 100_000_000, seed) for seed in range(20)]
    mean_s = sum(o.seconds for o in outcomes) / 20
    assert told.seconds == pytest.approx(mean_s, rel=0.03)
    assert told.gpu_hours == pytest.approx(sum(o.node_seconds for o in outcomes) / 20 * 8 / 3600, rel=0.03)
    assert told.preemptions == pytest.approx(sum(o.num_preemptions for o in outcomes) / 20, rel=0.25)
    assert told.seconds > outlook(rates(), Fleet(num_gpus=64, startup_s=90, provision_s=180), 100_000_000).seconds


def test_unknown_bandwidth_is_null_in_json():
    record = outlook(rates(), Fleet(num_gpus=1), 100).record()
    assert record["storage_rows_per_s"] is None
    assert "Infinity" not in json.dumps(record)


def test_named_gpus_by_their_work():
    # ViCLIP-L/14 on an H200: 790 TFLOP/s reachable, 60 % of it, 1.653 TFLOP a clip: 287 clips/s.
    assert clips_per_s_of("h200", 1.653e12) == pytest.approx(287, abs=1)
    assert set(GPUS) == {"h200", "h100", "a100", "l4", "t4"}
    with pytest.raises(ValueError, match="No figures for the GPU 'h300'"):
        clips_per_s_of("h300", 1e12)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="at least one accelerator"):
        Fleet(num_gpus=0)
    with pytest.raises(ValueError, match="Rates must be above 0"):
        rates(clips_per_s=0.0)
    assert math.isinf(Fleet(num_gpus=1).storage_bytes_per_s)
