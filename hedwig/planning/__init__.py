"""How long and how dear embedding a world is, before anything is bought: arithmetic, and a simulation of the fleet.

Numbers in, numbers out: nothing here reads an image, knows an experiment or talks to a cluster.
"""

from __future__ import annotations

from hedwig.planning.fleet import (
    GPUS,
    Fleet,
    Gpu,
    Limits,
    Outlook,
    Rates,
    clips_per_s_of,
    limits_of,
    node_fleet,
    outlook,
)
from hedwig.planning.simulate import NodeFleet, Outcome, expected, simulate

__all__ = [
    "GPUS",
    "Fleet",
    "Gpu",
    "Limits",
    "NodeFleet",
    "Outcome",
    "Outlook",
    "Rates",
    "clips_per_s_of",
    "expected",
    "limits_of",
    "node_fleet",
    "outlook",
    "simulate",
]
