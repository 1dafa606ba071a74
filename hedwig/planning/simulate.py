"""A discrete-event simulation of an embedding job on nodes that come late and may be taken away at any time.

Work comes in blocks, as in `hedwig.pipelines.rows`: what a killed node had not committed is done again, whole blocks of
it. Nodes are taken away as a Poisson process while they are there, and asked for again at once. All lanes (one
accelerator each) share the storage's bandwidth.

Blocks are not events. While there is work for everybody, every lane advances at one common pace, so the sum of that
pace over time (rows per lane, `_Clock.progress`) tells how many blocks each node has finished whenever one asks; the
only events are nodes that come, start and go. Only the end, when blocks run out, is played block by block. So 10^9 rows
on a thousand nodes cost as many steps as there are preemptions. `expected` has the closed forms of renewal theory that
the simulation must agree with in the long run.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Expectation", "NodeFleet", "Outcome", "expected", "simulate"]

ARRIVE, READY, PREEMPT = 0, 1, 2
MAX_EVENTS = 20_000_000


@dataclass(frozen=True)
class NodeFleet:
    """What does the work.

    Attributes:
        num_nodes: nodes that are wanted at all times.
        lanes_per_node: accelerators of a node; each has one block in hand.
        rows_per_s: of one lane, when storage is fast enough.
        block_rows: rows of a block.
        provision_s: from asking for a node until it is there; not paid.
        startup_s: from then until its lanes work (image, Ray, weights); paid.
        preemptions_per_hour: of a node that is there; 0 for nodes that nobody takes away.
        nodes_per_minute: how fast the autoscaler asks for the first nodes; inf: all at once.
        bytes_per_row: read from storage.
        storage_bytes_per_s: of all lanes together.
    """

    num_nodes: int
    lanes_per_node: int
    rows_per_s: float
    block_rows: int
    provision_s: float = 0.0
    startup_s: float = 0.0
    preemptions_per_hour: float = 0.0
    nodes_per_minute: float = math.inf
    bytes_per_row: float = 0.0
    storage_bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if min(self.num_nodes, self.lanes_per_node, self.block_rows) < 1:
            raise ValueError(f"A fleet needs at least one node, lane and row in a block: {self}.")
        if not (self.rows_per_s > 0 and self.storage_bytes_per_s > 0 and self.nodes_per_minute > 0):
            raise ValueError(f"The rates of a fleet must be above 0: {self}.")
        if min(self.provision_s, self.startup_s, self.preemptions_per_hour, self.bytes_per_row) < 0:
            raise ValueError(f"The delays of a fleet must not be negative: {self}.")

    def pace(self, num_lanes: int) -> float:
        """Rows per second of each of `num_lanes` working lanes."""
        if num_lanes == 0 or self.bytes_per_row == 0:
            return self.rows_per_s
        return min(self.rows_per_s, self.storage_bytes_per_s / (self.bytes_per_row * num_lanes))


@dataclass(frozen=True)
class Outcome:
    """What one simulated job came to.

    Attributes:
        seconds: until the last block was committed.
        node_seconds: paid for, from each node's arrival until it is taken away or the job ends.
        num_blocks: of the job.
        num_preemptions: nodes taken away.
        num_blocks_redone: blocks that were begun and lost.
        storage_bound_s: how long storage was what all waited for.
    """

    seconds: float
    node_seconds: float
    num_blocks: int
    num_preemptions: int
    num_blocks_redone: int
    storage_bound_s: float

    @property
    def mean_nodes(self) -> float:
        """Nodes that were there, on average."""
        return self.node_seconds / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Expectation:
    """Long-run averages of one node, by renewal theory.

    Attributes:
        there: share of the time that it is there.
        preemptions_per_s: how often it is taken away.
        rows_per_s: committed by all its lanes.
        useful: share of the paid time that goes into blocks that are committed.
    """

    there: float
    preemptions_per_s: float
    rows_per_s: float
    useful: float


def expected(fleet: NodeFleet, pace: float | None = None) -> Expectation:
    """Long-run averages of one node of a fleet whose lanes work at `pace` (rows/s; None: that of all nodes together).

    A node is there for an exponential time of mean 1/h and away for P = `provision_s`: a renewal process of cycle
    1/h + P. It works after S = `startup_s`, and commits floor((U - S) / B) blocks of B seconds per lane in a life of U
    seconds; for an exponential U that is on average exp(-h S) / (exp(h B) - 1) (sum over n of P(U > S + n B)).
    """
    if pace is None:
        pace = fleet.pace(fleet.num_nodes * fleet.lanes_per_node)
    hazard, block_s = fleet.preemptions_per_hour / 3600, fleet.block_rows / pace
    if hazard == 0:
        return Expectation(1.0, 0.0, pace * fleet.lanes_per_node, 1.0)
    life, cycle = 1 / hazard, 1 / hazard + fleet.provision_s
    exponent = min(hazard * block_s, 700.0)
    blocks = math.exp(-hazard * fleet.startup_s) / math.expm1(exponent)
    rows = blocks * fleet.block_rows * fleet.lanes_per_node
    return Expectation(life / cycle, 1 / cycle, rows / cycle, blocks * block_s / life)


class _Job:
    """The state of one simulated job; see the module's docstring for the two phases."""

    def __init__(self, fleet: NodeFleet, num_rows: int, seed: int) -> None:
        self.fleet = fleet
        self.total = -(-num_rows // fleet.block_rows)
        self.now, self.progress = 0.0, 0.0  # seconds; rows that a lane would have done since the beginning
        self.since: NDArray[np.float64] = np.full(fleet.num_nodes, np.nan)  # progress when a node's lanes began
        self.arrived = np.full(fleet.num_nodes, np.nan)
        self.committed, self.lost, self.preemptions = 0, 0, 0
        self.node_s, self.bound_s = 0.0, 0.0
        self._seed = seed
        self._chance: dict[int, np.random.Generator] = {}
        gap = 60 / fleet.nodes_per_minute
        self.events = [(fleet.provision_s + node * gap, ARRIVE, node) for node in range(fleet.num_nodes)]
        heapq.heapify(self.events)

    def life(self, node: int) -> float:
        """How long a node that arrives now will be there; each node has a sequence of chances of its own."""
        if self.fleet.preemptions_per_hour == 0:
            return math.inf
        chance = self._chance.setdefault(node, np.random.default_rng([self._seed, node]))
        return float(chance.exponential(3600 / self.fleet.preemptions_per_hour))

    def advance(self, when: float, num_lanes: int) -> None:
        """Let time pass; `num_lanes` lanes work meanwhile."""
        pace = self.fleet.pace(num_lanes)
        if num_lanes:
            self.progress += pace * (when - self.now)
            self.bound_s += (when - self.now) if pace < self.fleet.rows_per_s else 0.0
        self.now = float(when)

    def turn(self) -> tuple[int, int]:
        """Take the next event, do what every phase does with it, and return its kind and node."""
        _, kind, node = heapq.heappop(self.events)
        if kind == ARRIVE:
            self.arrived[node] = self.now
            life = self.life(node)
            if life > self.fleet.startup_s:
                heapq.heappush(self.events, (self.now + self.fleet.startup_s, READY, node))
            if math.isfinite(life):
                heapq.heappush(self.events, (self.now + life, PREEMPT, node))
        elif kind == PREEMPT:
            self.preemptions += 1
            self.node_s += self.now - float(self.arrived[node])
            self.arrived[node] = np.nan
            heapq.heappush(self.events, (self.now + self.fleet.provision_s, ARRIVE, node))
        return kind, node

    def done_blocks(self, progress: float) -> NDArray[np.int64]:
        """Blocks that each working node's lanes have finished, per lane, at a common progress (rows)."""
        working = self.since[~np.isnan(self.since)]
        # A block that is whole but for rounding is whole.
        return np.floor((progress - working) / self.fleet.block_rows + 1e-9).astype(np.int64)

    def begun(self, progress: float) -> int:
        """Blocks committed or in hand at a common progress, if there were blocks without end."""
        done = self.done_blocks(progress)
        return self.committed + self.fleet.lanes_per_node * int(done.sum() + len(done))


def simulate(fleet: NodeFleet, num_rows: int, seed: int = 0) -> Outcome:
    """Play one job of `num_rows` rows; the same seed gives the same preemptions.

    Raises:
        ValueError: nodes are taken away so fast that the job would not end.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows is {num_rows}; a job has at least one.")
    job = _Job(fleet, num_rows, seed)
    outlook = expected(fleet)
    if fleet.preemptions_per_hour and num_rows / max(outlook.rows_per_s * fleet.num_nodes, 1e-300) > 3e9:
        raise ValueError(
            f"At {fleet.preemptions_per_hour:g} preemptions an hour a block of {fleet.block_rows} rows, "
            f"{fleet.block_rows / fleet.rows_per_s:.0f} s of work, is hardly ever finished: use smaller blocks."
        )
    _bulk(job)
    _end(job)
    there = job.arrived[~np.isnan(job.arrived)]
    job.node_s += float((job.now - there).sum())
    return Outcome(job.now, job.node_s, job.total, job.preemptions, job.lost, job.bound_s)


def _bulk(job: _Job) -> None:
    """As long as there is a block for every lane that asks; stops just before the last ones are handed out."""
    lanes, block = job.fleet.lanes_per_node, job.fleet.block_rows
    for _ in range(MAX_EVENTS):
        when, kind, node = job.events[0] if job.events else (math.inf, PREEMPT, 0)
        working = int((~np.isnan(job.since)).sum())
        pace = job.fleet.pace(working * lanes)
        enough = (job.total + 1) * block  # rows of one lane after which there is certainly nothing left
        ahead = job.progress + (min(pace * (when - job.now), enough) if working else 0.0)
        if working and job.begun(ahead) > job.total:
            low, high = job.progress, ahead
            if job.begun(low) <= job.total:
                while high - low > 1e-6 * block:  # the last moment at which all that was begun exists
                    middle = (low + high) / 2
                    low, high = (middle, high) if job.begun(middle) <= job.total else (low, middle)
            job.advance(job.now + (low - job.progress) / pace, working * lanes)
            return
        if kind == READY and job.begun(ahead) + lanes > job.total:
            job.advance(when, working * lanes)  # not enough for all lanes of the node that becomes ready
            return
        job.advance(when, working * lanes)
        kind, node = job.turn()
        if kind == READY:
            job.since[node] = job.progress
        elif kind == PREEMPT and not np.isnan(job.since[node]):
            whole = int(np.floor((job.progress - job.since[node]) / block + 1e-9))
            job.committed += whole * lanes
            job.lost += lanes
            job.since[node] = np.nan
    raise RuntimeError(f"The simulation did not end after {MAX_EVENTS} events.")


def _end(job: _Job) -> None:
    """The last blocks one by one: lanes without work wait, and blocks that are lost go back into the queue."""
    lanes, block = job.fleet.lanes_per_node, job.fleet.block_rows
    queue = job.total - job.begun(job.progress)
    in_hand: dict[int, list[float]] = {}  # node -> progress at which each of its lanes is done
    for node, since in enumerate(job.since.tolist()):
        if math.isnan(since):
            continue
        whole = math.floor((job.progress - since) / block + 1e-9)
        in_hand[node] = [since + (whole + 1) * block] * lanes
        job.committed += whole * lanes
    job.since[:] = np.nan
    while job.committed < job.total:
        busy = sum(map(len, in_hand.values()))
        for node in sorted(in_hand):  # whoever is free takes what there is
            done_at = in_hand[node]
            take = min(lanes - len(done_at), queue)
            done_at += [job.progress + block] * take
            queue, busy = queue - take, busy + take
        ahead = min((min(done_at) for done_at in in_hand.values() if done_at), default=math.inf)
        finish = job.now + (ahead - job.progress) / job.fleet.pace(busy) if busy else math.inf
        if finish <= (job.events[0][0] if job.events else math.inf):
            job.advance(max(finish, job.now), busy)
            job.progress = max(job.progress, ahead)  # without the rounding of the product
            for done_at in in_hand.values():
                left = [one for one in done_at if one > job.progress + 1e-6 * block]
                job.committed += len(done_at) - len(left)
                done_at[:] = left
            continue
        job.advance(job.events[0][0], busy)
        kind, node = job.turn()
        if kind == READY:
            in_hand[node] = []
        elif kind == PREEMPT and node in in_hand:
            job.lost += len(in_hand[node])
            queue += len(in_hand.pop(node))
