"""The simulation against closed forms and against a slow twin that plays every block."""

import heapq
import math
import time

import numpy as np
import pytest

from hedwig.planning import NodeFleet, expected, simulate


def fleet(**changes):
    settings = {"num_nodes": 4, "lanes_per_node": 2, "rows_per_s": 10.0, "block_rows": 100}
    return NodeFleet(**{**settings, **changes})


def slow_twin(fleet, num_rows, seed):
    """Every block of every lane an event; no storage limit. Same chances, drawn node by node."""
    total, block_s = math.ceil(num_rows / fleet.block_rows), fleet.block_rows / fleet.rows_per_s
    chance = [np.random.default_rng([seed, node]) for node in range(fleet.num_nodes)]
    events, order = [], 0

    def push(when, kind, node, life=0):
        nonlocal order
        order += 1
        heapq.heappush(events, (when, order, kind, node, life))

    for node in range(fleet.num_nodes):
        push(fleet.provision_s + node * 60 / fleet.nodes_per_minute, "arrive", node)
    life_of, arrived, idle, in_hand = [0] * fleet.num_nodes, {}, {}, {}
    queue, committed, lost, preemptions, paid, now = total, 0, 0, 0, 0.0, 0.0
    while committed < total:
        now, _, kind, node, life = heapq.heappop(events)
        if kind == "arrive":
            life_of[node] += 1
            arrived[node] = now
            push(now + fleet.startup_s, "ready", node, life_of[node])
            if fleet.preemptions_per_hour:
                push(now + chance[node].exponential(3600 / fleet.preemptions_per_hour), "preempt", node)
        elif kind == "ready" and life == life_of[node] and node in arrived:
            idle[node], in_hand[node] = fleet.lanes_per_node, 0
        elif kind == "done" and life == life_of[node] and node in in_hand:
            committed, in_hand[node], idle[node] = committed + 1, in_hand[node] - 1, idle[node] + 1
        elif kind == "preempt":
            preemptions += 1
            paid += now - arrived.pop(node)
            lost, queue = lost + in_hand.get(node, 0), queue + in_hand.get(node, 0)
            idle.pop(node, None), in_hand.pop(node, None)
            push(now + fleet.provision_s, "arrive", node)
        for one in sorted(idle):
            while idle[one] and queue:
                idle[one], in_hand[one], queue = idle[one] - 1, in_hand[one] + 1, queue - 1
                push(now + block_s, "done", one, life_of[one])
    return now, paid + sum(now - a for a in arrived.values()), preemptions, lost


def test_undisturbed_it_is_rows_over_rate_and_start_up():
    # 8 lanes x 10 rows/s, 80 blocks = 10 rounds of 10 s.
    outcome = simulate(fleet(provision_s=30, startup_s=12), 8000)
    assert outcome.seconds == pytest.approx(30 + 12 + 8000 / 80)
    assert outcome.node_seconds == pytest.approx(4 * (12 + 100))
    assert (outcome.num_blocks, outcome.num_preemptions, outcome.num_blocks_redone) == (80, 0, 0)


def test_the_last_round_is_a_whole_block_even_for_one_row():
    assert simulate(fleet(), 8001).seconds == pytest.approx(110)
    assert simulate(fleet(), 1).seconds == pytest.approx(10)
    assert simulate(fleet(num_nodes=100), 250).seconds == pytest.approx(10)  # more lanes than blocks


def test_storage_slows_all_lanes_alike():
    # 8 lanes want 80 rows/s x 1000 B = 80 kB/s and get 20: four times as long.
    outcome = simulate(fleet(bytes_per_row=1000, storage_bytes_per_s=20_000, startup_s=5), 8000)
    assert outcome.seconds == pytest.approx(5 + 400)
    assert outcome.storage_bound_s == pytest.approx(400)
    assert simulate(fleet(bytes_per_row=1000, storage_bytes_per_s=80_001), 8000).storage_bound_s == 0


def test_nodes_that_come_one_by_one():
    # One node a minute, 20 rows/s each: 0..60 s one node (1200 rows), then two (2400), and so on.
    outcome = simulate(fleet(nodes_per_minute=1.0), 3600)
    assert outcome.seconds == pytest.approx(120)


@pytest.mark.parametrize(
    ("changes", "num_rows"),
    [
        ({"preemptions_per_hour": 20.0, "provision_s": 40.0, "startup_s": 15.0}, 30_000),
        ({"preemptions_per_hour": 100.0, "provision_s": 0.0, "startup_s": 7.0, "num_nodes": 7}, 20_050),
        ({"preemptions_per_hour": 60.0, "provision_s": 3.0, "lanes_per_node": 1, "num_nodes": 1}, 5_000),
        ({"preemptions_per_hour": 30.0, "startup_s": 31.0, "nodes_per_minute": 2.3, "lanes_per_node": 8}, 9_999),
    ],
)
def test_equal_to_playing_every_block(changes, num_rows):
    nodes = fleet(**changes)
    for seed in range(8):
        outcome = simulate(nodes, num_rows, seed)
        seconds, paid, preemptions, lost = slow_twin(nodes, num_rows, seed)
        assert outcome.seconds == pytest.approx(seconds, rel=1e-6)
        assert outcome.node_seconds == pytest.approx(paid, rel=1e-6)
        assert (outcome.num_preemptions, outcome.num_blocks_redone) == (preemptions, lost)


def test_the_long_run_agrees_with_renewal_theory():
    """Preemptions, nodes that are there (Little's law) and lost work, over about 4,000 lives of nodes."""
    nodes = fleet(num_nodes=40, preemptions_per_hour=6.0, provision_s=200.0, startup_s=60.0)
    outcome, mean = simulate(nodes, 36_000_000), expected(nodes)
    assert outcome.num_preemptions > 2_000
    assert mean.there == pytest.approx(600 / 800)
    tolerance = 4 / math.sqrt(outcome.num_preemptions)
    assert outcome.num_preemptions == pytest.approx(40 * outcome.seconds / 800, rel=tolerance)
    assert outcome.mean_nodes == pytest.approx(30, rel=tolerance)
    assert 36_000_000 / outcome.seconds == pytest.approx(40 * mean.rows_per_s, rel=tolerance)
    useful = outcome.num_blocks * 10.0 / (outcome.node_seconds * 2)
    assert useful == pytest.approx(mean.useful, rel=tolerance)


def test_expected_without_and_with_small_hazard():
    assert expected(fleet()).rows_per_s == 20
    # First order in the hazard h: a preemption costs start-up, half a block and the absence.
    nodes = fleet(preemptions_per_hour=0.36, provision_s=100.0, startup_s=50.0)  # h = 1e-4 per s
    cost = 1e-4 * (100 + 50 + 10 / 2)
    assert expected(nodes).rows_per_s == pytest.approx(20 * (1 - cost), rel=3e-4)


def test_blocks_that_never_end_are_refused():
    with pytest.raises(ValueError, match="use smaller blocks"):
        simulate(fleet(preemptions_per_hour=3600.0, block_rows=100_000), 10**6)


def test_a_billion_rows_on_a_thousand_lanes_take_no_time():
    nodes = fleet(num_nodes=128, lanes_per_node=8, rows_per_s=250.0, preemptions_per_hour=0.2, provision_s=120.0)
    began = time.process_time()
    outcome = simulate(nodes, 10**9)
    assert outcome.num_blocks == 10**7
    assert outcome.num_preemptions > 10
    assert time.process_time() - began < 20  # playing every block would take minutes
