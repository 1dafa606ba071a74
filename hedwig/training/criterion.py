"""What the geolocator head is trained against: a loss over cells, coarser levels, and pairs of panoramas.

One object holds the tensors that every step needs, on the device of the model. The coarser levels come from the
geocells (`hedwig.geocells.hierarchy`) and have no weights of their own. Pairs are those within one worker's share of a
batch, so only with this term does the number of workers change what is minimised; it is no part of the validation
loss, which must not depend on who is in a batch with whom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hedwig.losses import (
    banded_contrastive_loss,
    cross_entropy,
    haversine_smoothing_loss,
    haversine_targets,
    hierarchical_cross_entropy,
    squared_error,
)
from hedwig.training.rows import Batch, Plan

__all__ = ["LOSSES", "Criterion", "check_losses", "parents_of"]

LOSSES = ("ce", "mse", "haversine", "haversine_raw")
MAX_LEVELS = 3


def check_losses(
    loss: str, hierarchy_weights: Sequence[float], contrastive_weight: float, near_km: float, far_km: float
) -> None:
    """Refuse settings that make no loss.

    Raises:
        ValueError: naming the setting and the value.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}.")
    if len(hierarchy_weights) > MAX_LEVELS or any(not 0 <= w < np.inf for w in hierarchy_weights):
        raise ValueError(
            f"hierarchy_weights must be at most {MAX_LEVELS} numbers of at least 0, one per coarser level and the "
            f"coarsest first; got {tuple(hierarchy_weights)}."
        )
    if not 0 <= contrastive_weight < np.inf:
        raise ValueError(f"contrastive_weight must be at least 0, got {contrastive_weight}.")
    if not 0 < near_km <= far_km:
        raise ValueError(f"near_km and far_km must be 0 < near_km <= far_km, got {near_km} and {far_km}.")


def parents_of(geocells: Any, num_levels: int) -> tuple[NDArray[np.int64], ...]:
    """The parent (C,) of each cell on the `num_levels` coarsest levels, the coarsest first; -1 where it has no name.

    Args:
        geocells: `hedwig.geocells.Geocells`; without a hierarchy, the column ``country`` of its table is one level.
        num_levels: how many.

    Raises:
        ValueError: the geocells have fewer levels, or no cell has a name on one of them.
    """
    if num_levels == 0:
        return ()
    if hasattr(geocells, "hierarchy"):
        levels = [(level.column, level.names, level.parent) for level in geocells.hierarchy()]
    elif "country" in geocells.table:
        names, parent = np.unique(np.asarray(geocells.table["country"]).astype(str), return_inverse=True)
        levels = [("country", names, parent.reshape(-1))]
    else:
        levels = []
    if len(levels) < num_levels:
        raise ValueError(
            f"hierarchy_weights has {num_levels} weights and the geocells have {len(levels)} coarser level(s); build "
            "the geocells with more levels, or give fewer weights."
        )
    parents = []
    for column, names, parent in levels[:num_levels]:
        nameless = np.array([not str(name).strip("/") for name in names])  # where the country is unknown: "" and "/"
        if nameless.all():
            raise ValueError(
                f"No geocell has a name in the column {column!r}; build the geocells with a geography, or set "
                "hierarchy_weights to ()."
            )
        parents.append(np.where(nameless[parent], -1, parent).astype(np.int64))
    return tuple(parents)


class Criterion:
    """The terms of the loss, on one device.

    Args:
        settings: loss, tau_km, hierarchy_weights, contrastive_weight, near_km, far_km.
        plan: of the table, with the parents of its cells.
        device: where logits and batches are.
    """

    def __init__(self, settings: Mapping[str, Any], plan: Plan, device: torch.device) -> None:
        self.settings = settings
        self.cell_lat = torch.tensor(plan.cell_lat, device=device)
        self.cell_lon = torch.tensor(plan.cell_lon, device=device)
        self.parents = [torch.tensor(parent, device=device) for parent in plan.parents]

    def cells(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss over the cells and, by `hierarchy_weights`, over the coarser levels; logits (B, C) float32."""
        total = self._finest(logits, batch)
        if self.parents:
            weights = self.settings["hierarchy_weights"]
            total = total + hierarchical_cross_entropy(logits, batch.cell_ids, self.parents, weights)
        return total

    def pairs(self, projected: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted contrastive term over projected (B, P), and the number of rows that have a near one."""
        loss, num_anchors = banded_contrastive_loss(
            projected, batch.lat, batch.lon, near_km=self.settings["near_km"], far_km=self.settings["far_km"]
        )
        return self.settings["contrastive_weight"] * loss, num_anchors

    def _finest(self, logits: Tensor, batch: Batch) -> Tensor:
        loss = self.settings["loss"]
        if loss == "ce":
            return cross_entropy(logits, batch.cell_ids)
        if loss == "mse":
            return squared_error(logits, batch.cell_ids)
        targets = haversine_targets(
            self.cell_lat,
            self.cell_lon,
            batch.lat,
            batch.lon,
            batch.cell_ids,
            tau_km=self.settings["tau_km"],
            normalised=loss == "haversine",
        )
        return haversine_smoothing_loss(logits, targets)
