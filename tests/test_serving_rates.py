"""Rates: one bucket a caller, over all replicas together."""

from __future__ import annotations

import asyncio
import time

import pytest

from hedwig.serving.rates import Buckets, LeasedRates, Rate, open_rates, stop_rates


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_bucket_grants_its_burst_and_then_its_rate():
    buckets = Buckets(Rate(2.0, 5))
    assert buckets.take("a", 3, 0.0) == (3, 0.0)
    assert buckets.take("a", 3, 0.0) == (2, 0.0)
    assert buckets.take("a", 1, 0.0) == (0, 0.5)
    assert buckets.take("b", 1, 0.0) == (1, 0.0)  # another caller, another bucket
    assert buckets.take("a", 5, 1.0) == (2, 0.0)
    assert buckets.take("a", 9, 1000.0) == (5, 0.0)  # no more than the burst is kept
    assert buckets.take("a", 1, 0.0) == (0, 0.5)  # a clock that goes back gives nothing


def test_against_a_slow_twin():
    buckets = Buckets(Rate(3.0, 7))
    granted = []
    for step in range(2000):
        now = step * 0.05
        num, _ = buckets.take("a", 1, now)
        granted += [now] * num
    for start in granted[::97]:  # in no window more than the burst and what flows in
        for length in (0.5, 2.0, 10.0):
            assert sum(start <= t < start + length for t in granted) <= 7 + 3.0 * length + 1e-6
    assert len(granted) == pytest.approx(7 + 3.0 * 100, abs=2)


def test_memory_is_bounded_and_debts_are_paid():
    buckets = Buckets(Rate(1.0, 4), most=10)
    for i in range(1000):
        buckets.take(str(i), 1, 0.0)
    assert len(buckets) == 10
    buckets.charge("debtor", 10, 0.0)
    assert buckets.take("debtor", 1, 0.0) == (0, 7.0)
    assert buckets.take("debtor", 1, 7.0) == (1, 0.0)


def test_nonsense_is_refused():
    for bad in ((0.0, 1), (1.0, 0), (float("nan"), 1)):
        with pytest.raises(ValueError, match="burst"):
            Rate(*bad)


def test_replicas_together_never_grant_more_than_one_bucket_and_ask_seldom():
    clock, rate = Clock(), Rate(200.0, 80)
    buckets, asked = Buckets(rate), 0

    async def ask(caller, charge, want):
        nonlocal asked
        asked += 1
        return buckets.take(caller, want, clock())

    replicas = [LeasedRates(rate, ask, clock=clock) for _ in range(3)]

    async def flood():
        granted = tried = 0
        for step in range(4000):
            clock.now = 100.0 + step / 1000  # four seconds at 1,000 requests a second
            granted += await replicas[step % 3].spend("a") == 0.0
            tried += 1
        return granted, tried

    granted, tried = asyncio.run(flood())
    assert granted <= 80 + 200 * 4
    assert granted >= 0.9 * (80 + 200 * 4)
    assert asked < tried / 3  # what was refused is remembered, what was granted comes in blocks
    assert rate.lease == 10


def test_refusals_say_how_long_and_hold():
    clock, rate = Clock(), Rate(0.5, 1)
    buckets = Buckets(rate)

    async def ask(caller, charge, want):
        return buckets.take(caller, want, clock())

    async def scenario():
        rates = LeasedRates(rate, ask, clock=clock)
        assert await rates.spend("a") == 0.0
        assert await rates.spend("a") == pytest.approx(2.0)
        clock.now += 1.5
        assert await rates.spend("a") == pytest.approx(0.5)
        clock.now += 0.6
        assert await rates.spend("a") == 0.0

    asyncio.run(scenario())


def test_many_at_once_share_one_question():
    clock, rate = Clock(), Rate(100.0, 80)
    buckets, asked = Buckets(rate), 0

    async def ask(caller, charge, want):
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        return buckets.take(caller, want, clock())

    async def scenario():
        rates = LeasedRates(rate, ask, clock=clock)
        return await asyncio.gather(*(rates.spend("a") for _ in range(100)))

    waits = asyncio.run(scenario())
    assert waits.count(0.0) == 80
    assert asked == 9  # eight blocks of ten, and one refusal


def test_without_the_actor_a_replica_counts_its_share():
    clock = Clock()

    async def ask(caller, charge, want):
        raise ConnectionError

    async def scenario():
        rates = LeasedRates(Rate(10.0, 8), ask, share=0.5, clock=clock)
        await rates.charge("b", 2)
        return [await rates.spend("a") for _ in range(9)], [await rates.spend("b") for _ in range(4)]

    for waits, good in zip(asyncio.run(scenario()), (4, 2), strict=True):
        assert [w == 0.0 for w in waits] == [True] * good + [False] * (len(waits) - good)


def test_one_process_alone_needs_no_actor():
    async def scenario():
        rates = LeasedRates(Rate(1.0, 2), clock=Clock())
        return [await rates.spend("a") for _ in range(3)]

    assert asyncio.run(scenario()) == [0.0, 0.0, 1.0]


def test_on_ray_two_replicas_share_one_bucket_and_survive_its_death(ray_session):
    import ray

    @ray.remote(num_cpus=0)
    class Replica:
        def __init__(self):
            self.rates = open_rates(Rate(0.01, 40), num_replicas=2)

        async def spend(self, num):
            return [await self.rates.spend("a") for _ in range(num)].count(0.0)

    replicas = [Replica.remote() for _ in range(2)]
    assert sum(ray.get([r.spend.remote(60) for r in replicas], timeout=60)) == 40
    stop_rates()  # they are replaced, or counted without; no request fails
    time.sleep(0.5)
    assert 0 <= sum(ray.get([r.spend.remote(60) for r in replicas], timeout=60)) <= 2 * 40
    stop_rates()
