"""How often one caller may ask, over all replicas together.

A token bucket per caller (Turner 1986, "New directions in communications", the leaky bucket as a meter) lives in one
Ray actor. A replica does not ask it for every request: it leases a few tokens at a time and spends them itself, and
what the actor refused it remembers until there is something to be had again, so that a flood costs no calls at all.
Whatever is spent was leased and whatever was leased was in the bucket: all replicas together never grant more than
`burst` + `per_s` x time. They may grant less, by the tokens that lie in replicas which no longer see that caller;
these are few and expire. Where the actor cannot be reached a replica counts by itself, with its share of the rate.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Buckets", "LeasedRates", "Rate", "open_rates", "stop_rates"]

_log = logging.getLogger(__name__)

_ACTOR, _NAMESPACE = "hedwig-rates", "hedwig"
_MOST_CALLERS = 100_000  # about 20 MB; the longest unseen is forgotten, and starts anew with a full bucket
_LEASE_S = 1.0  # tokens a replica has not spent by then are lost
_ASK_TIMEOUT_S = 1.0
_START_S = 30.0
_ALONE_S = 5.0  # how long to count alone before the actor is asked again

Ask = Callable[[str, int, int], Awaitable[tuple[int, float]]]


@dataclass(frozen=True)
class Rate:
    """What one caller is granted.

    Attributes:
        per_s: Requests per second in the long run.
        burst: Requests at once after a pause; at least 1.
    """

    per_s: float
    burst: int

    def __post_init__(self) -> None:
        if not self.per_s > 0 or self.burst < 1:
            raise ValueError(
                f"rate of {self.per_s:g}/s with a burst of {self.burst}: above 0 and at least 1 are needed."
            )

    @property
    def lease(self) -> int:
        """Tokens a replica takes at a time: a tenth of a second's worth, and never more than an eighth of the burst."""
        return max(1, min(int(self.per_s / 10), self.burst // 8))


class Buckets:
    """One token bucket for each caller, in one process. Pure arithmetic: the clock is the caller's.

    Args:
        rate: The same for all.
        most: Callers remembered.
    """

    def __init__(self, rate: Rate, *, most: int = _MOST_CALLERS) -> None:
        self._rate, self._most = rate, most
        self._filled: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def take(self, caller: str, want: int, now: float) -> tuple[int, float]:
        """(tokens granted, of `want`; seconds until there are as many, 0 when some were granted).

        Args:
            caller: Whose bucket.
            want: At most so many.
            now: Seconds of any clock that never goes back.
        """
        # Refused until all of `want` is there: at the rate's edge a replica would otherwise ask for each single token.
        rate = self._rate
        tokens, then = self._filled.pop(caller, (float(rate.burst), now))
        tokens = min(rate.burst, tokens + max(0.0, now - then) * rate.per_s)
        granted = max(0, min(want, int(tokens + 1e-9)))
        self._filled[caller] = (tokens - granted, max(now, then))
        if len(self._filled) > self._most:
            self._filled.popitem(last=False)
        return granted, 0.0 if granted else max(1e-3, (want - tokens) / rate.per_s)

    def charge(self, caller: str, num: int, now: float) -> None:
        """Take `num` tokens whether they are there or not; at most a minute's worth is owed."""
        self.take(caller, 0, now)
        tokens, then = self._filled[caller]
        self._filled[caller] = (max(tokens - num, -60.0 * self._rate.per_s), then)

    def __len__(self) -> int:
        return len(self._filled)


@dataclass
class _Lease:
    tokens: int = 0
    good_until: float = 0.0
    refused_until: float = 0.0
    asking: asyncio.Future[None] | None = None


class LeasedRates:
    """A replica's side: spends what it has leased, and asks for more when that is used up.

    Args:
        rate: What one caller is granted, over all replicas.
        ask: (caller, charge, want) -> (granted, seconds until there is one), where `charge` tokens are taken first
            whether they are there or not; counts within this process when None.
        share: Of the rate, while `ask` fails; 1 / the number of replicas.
        clock: Seconds that never go back.
    """

    def __init__(
        self, rate: Rate, ask: Ask | None = None, *, share: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._ask, self._clock = rate, ask, clock
        self._alone = Buckets(Rate(rate.per_s * share, max(1, int(rate.burst * share))))
        self._alone_until = 0.0
        self._leases: OrderedDict[str, _Lease] = OrderedDict()

    async def spend(self, caller: str) -> float:
        """0 when the request is granted, else the seconds after which another one is."""
        if self._ask is None:
            return self._by_itself(caller)
        lease = self._leases.setdefault(caller, _Lease())
        self._leases.move_to_end(caller)
        if len(self._leases) > _MOST_CALLERS:
            self._leases.popitem(last=False)
        while True:
            now = self._clock()
            if lease.tokens > 0 and now < lease.good_until:
                lease.tokens -= 1
                return 0.0
            if now < lease.refused_until:
                return lease.refused_until - now
            if now < self._alone_until:
                return self._by_itself(caller)
            if lease.asking is None:
                await self._lease_more(caller, lease)
            else:  # somebody of this caller is asking already
                await asyncio.shield(lease.asking)

    async def _lease_more(self, caller: str, lease: _Lease) -> None:
        ask = self._ask
        if ask is None:
            return
        lease.asking = asyncio.get_running_loop().create_future()
        try:
            granted, wait_s = await asyncio.wait_for(ask(caller, 0, self._rate.lease), _ASK_TIMEOUT_S)
        except Exception as error:  # whatever Ray raises: limiting must not end the service
            _log.warning("the rate actor does not answer (%s); counting alone for now", type(error).__name__)
            self._alone_until = self._clock() + _ALONE_S
        else:
            now = self._clock()
            # A block may outlive the bucket's own pace where one token is worth more than a lease's life.
            lease.tokens, lease.good_until = granted, now + max(_LEASE_S, 1.0 / self._rate.per_s)
            lease.refused_until = now + wait_s if granted == 0 else 0.0
        finally:
            lease.asking.set_result(None)
            lease.asking = None

    async def charge(self, caller: str, num: int) -> None:
        """Count `num` requests that have been granted already."""
        if self._ask is not None and self._clock() >= self._alone_until:
            lease = self._leases.setdefault(caller, _Lease())
            spent = min(lease.tokens, num)
            lease.tokens -= spent
            if spent == num:
                return
            try:
                await asyncio.wait_for(self._ask(caller, num - spent, 0), _ASK_TIMEOUT_S)
                return
            except Exception as error:  # as above
                _log.warning("the rate actor does not answer (%s); counting alone for now", type(error).__name__)
                self._alone_until = self._clock() + _ALONE_S
        self._alone.charge(caller, num, self._clock())

    def _by_itself(self, caller: str) -> float:
        granted, wait_s = self._alone.take(caller, 1, self._clock())
        return 0.0 if granted else wait_s


class RatesActor:
    """The buckets of all replicas; `open_rates` makes it an actor. It forgets everything when it dies, and may.

    Args:
        per_s: See `Rate`.
        burst: See `Rate`.
    """

    def __init__(self, per_s: float, burst: int) -> None:
        self._buckets = Buckets(Rate(per_s, burst))

    async def lease(self, caller: str, charge: int, want: int) -> tuple[int, float]:
        """See `Buckets.charge` and `Buckets.take`; the clock is this process's."""
        now = time.monotonic()
        if charge:
            self._buckets.charge(caller, charge, now)
        return self._buckets.take(caller, want, now)


def open_rates(rate: Rate, *, num_replicas: int = 1) -> LeasedRates:
    """A replica's rates, with the actor started if it is not there; call it in a process that has Ray.

    Args:
        rate: What one caller is granted, over all replicas.
        num_replicas: Between them the rate is divided while the actor is away.
    """
    actor: Any = None

    def find() -> Any:
        import ray

        maker: Any = ray.remote(RatesActor)
        options = {"num_cpus": 0, "max_restarts": -1, "lifetime": "detached", "get_if_exists": True}
        # The rate is part of the name: a service that starts with another one must not find this one's buckets.
        name = f"{_ACTOR}-{rate.per_s:g}-{rate.burst}"
        return maker.options(name=name, namespace=_NAMESPACE, **options).remote(rate.per_s, rate.burst)

    async def ask(caller: str, charge: int, want: int) -> tuple[int, float]:
        nonlocal actor
        try:
            if actor is None:
                actor = await asyncio.to_thread(find)
            granted, wait_s = await actor.lease.remote(caller, charge, want)
        except BaseException:
            actor = None
            raise
        return int(granted), float(wait_s)

    def settle() -> None:
        nonlocal actor
        import ray

        actor = find()
        ray.get(actor.lease.remote("", 0, 0), timeout=_START_S)

    # Before the first request: while the actor starts, every replica would grant its share and then the actor its own.
    starting = threading.Thread(target=_quietly, args=(settle,), daemon=True)
    starting.start()
    starting.join(_START_S)
    return LeasedRates(rate, ask, share=1.0 / max(1, num_replicas))


def _quietly(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:  # it is asked again with the first request, and until then counted alone
        _log.warning("the actor of the rates has not answered yet (%s)", type(error).__name__)


def stop_rates() -> None:
    """End the actors that services of this Ray have left."""
    import ray

    for found in ray.util.list_named_actors(all_namespaces=True):
        if found["namespace"] == _NAMESPACE and found["name"].startswith(_ACTOR):
            ray.kill(ray.get_actor(found["name"], namespace=_NAMESPACE))
