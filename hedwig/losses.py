"""Losses over geocells and between vectors: what a head or an encoder is trained against.

Haversine smoothing is PIGEON's (arXiv 2307.05845, eq. 1-2): near cells are less wrong than far ones. As published its
targets do not sum to one, and the sum, so the weight of the loss, drifts with the number of cells (about 1.2 at 100
cells and 5 at 2000); `normalised` removes that. The coarser levels of the hierarchy have no weights of their own: a
parent is as probable as its cells together. Plain functions of tensors, made on their device.

Targets need no trigonometry per pair: distances come from dot products of unit vectors. The dot products are float64,
because 1 - u.v loses all digits of float32 below a few km; the rest is float32. `pairwise_km` is within 1 m of the
exact distance up to 1,000 km, within 20 m up to 15,000 km, and within 10 km of it near the antipode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hedwig.geo import EARTH_RADIUS_KM

__all__ = [
    "banded_contrastive_loss",
    "cross_entropy",
    "haversine_km",
    "haversine_smoothing_loss",
    "haversine_targets",
    "hierarchical_cross_entropy",
    "pairwise_km",
    "parent_cross_entropy",
    "squared_error",
    "video_text_loss",
]


def cross_entropy(logits: Tensor, cell_ids: Tensor) -> Tensor:
    """Mean of -log p(true cell).

    Args:
        logits: (B, C).
        cell_ids: (B,) int64 in [0, C).
    """
    return F.cross_entropy(logits, cell_ids)


def squared_error(logits: Tensor, cell_ids: Tensor) -> Tensor:
    """Mean over the batch of the sum over cells of (p_i - 1[i is true])^2: the multi-class Brier score, in [0, 2].

    HEDWIG tried "MSE to compute the discrepancy between predicted clusters and true cluster labels" and names neither
    logits nor probabilities; we take probabilities. `torch.nn.MSELoss` would also divide by C, so that its gradient
    would vanish with the number of cells.

    Args:
        logits: (B, C).
        cell_ids: (B,) int64 in [0, C).
    """
    probs = logits.softmax(dim=1)
    true = probs.gather(1, cell_ids[:, None])[:, 0]
    return (probs.square().sum(dim=1) - 2 * true + 1).mean()


def parent_cross_entropy(logits: Tensor, cell_ids: Tensor, parent: Tensor) -> Tensor:
    """Mean of -log p(true parent), where a parent is as probable as its cells together; 0 if no row has a parent.

    log p(parent) = logsumexp of its cells' logits - logsumexp of all. Rows whose true cell has no parent are left out.

    Args:
        logits: (B, C).
        cell_ids: (B,) int64 in [0, C), the true cells.
        parent: (C,) int64, the parent of each cell; below 0 if it has none.
    """
    true = parent[cell_ids]
    known = true >= 0
    cells = _cells_of(parent)[true.clamp(min=0)]
    cells[:, 0] = torch.where(known, cells[:, 0], 0)  # so that rows left out stay finite, and so do their gradients
    inside = logits.gather(1, cells.clamp(min=0)).masked_fill(cells < 0, -torch.inf).logsumexp(dim=1)
    return ((logits.logsumexp(dim=1) - inside) * known).sum() / known.sum().clamp(min=1)


def _cells_of(parent: Tensor) -> Tensor:
    """Cells of each parent, one parent a row, filled up with -1: of 2,000 logits a row needs only the siblings'."""
    cells = torch.nonzero(parent >= 0)[:, 0]
    cells = cells[torch.argsort(parent[cells], stable=True)]
    counts = torch.bincount(parent[cells], minlength=1)
    table = parent.new_full((len(counts), max(1, int(counts.max()))), -1)
    first = counts.cumsum(0) - counts
    table[parent[cells], torch.arange(len(cells), device=cells.device) - first[parent[cells]]] = cells
    return table


def hierarchical_cross_entropy(
    logits: Tensor, cell_ids: Tensor, parents: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """Weighted sum over coarser levels of `parent_cross_entropy`; that of the cells themselves is not in it.

    Args:
        logits: (B, C).
        cell_ids: (B,) int64 in [0, C).
        parents: for each level (C,) int64.
        weights: one per level; 0 leaves it out.
    """
    if len(parents) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(parents)} levels; give one per level.")
    total = logits.new_zeros(())
    for parent, weight in zip(parents, weights, strict=True):
        if weight:
            total = total + weight * parent_cross_entropy(logits, cell_ids, parent)
    return total


def haversine_km(lat1: Tensor, lon1: Tensor, lat2: Tensor, lon2: Tensor) -> Tensor:
    """Great-circle distance in km, float64; arguments in degrees, broadcast. `hedwig.geo.haversine_km` in torch."""
    lat1, lon1, lat2, lon2 = (torch.deg2rad(a.double()) for a in (lat1, lon1, lat2, lon2))
    half_chord_sq = (
        torch.sin((lat2 - lat1) / 2) ** 2 + torch.cos(lat1) * torch.cos(lat2) * torch.sin((lon2 - lon1) / 2) ** 2
    )
    return 2 * EARTH_RADIUS_KM * torch.asin(half_chord_sq.clamp(0.0, 1.0).sqrt())


def pairwise_km(lat1: Tensor, lon1: Tensor, lat2: Tensor, lon2: Tensor) -> Tensor:
    """Great-circle distance in km of every pair, (N, M) float32, from degrees (N,) and (M,); the module says how exact.

    With the half chord h, h^2 = (1 - u.v)/2 and the distance is 2 R asin(h).
    """
    half_chord_sq = (_unit_vectors(lat1, lon1) @ _unit_vectors(lat2, lon2).T).mul_(-0.5).add_(0.5)
    return half_chord_sq.clamp_(0.0, 1.0).float().sqrt_().asin_().mul_(2 * EARTH_RADIUS_KM)


def _unit_vectors(lat: Tensor, lon: Tensor) -> Tensor:
    """(N, 3) float64 of degrees (N,)."""
    lat, lon = torch.deg2rad(lat.double()), torch.deg2rad(lon.double())
    return torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], dim=1)


def haversine_targets(
    cell_lat: Tensor,
    cell_lon: Tensor,
    lat: Tensor,
    lon: Tensor,
    cell_ids: Tensor | None,
    *,
    tau_km: float,
    normalised: bool,
) -> Tensor:
    """Soft targets that fall off with the distance from the panorama to each cell's centre.

    With d_i the distance to cell i: exp(-(d_i - d_true)/tau) as published, or softmax_i(-d_i/tau) if `normalised`,
    which is the same up to a factor per row. As published, a cell nearer than the true one gets more than 1.

    Args:
        cell_lat: (C,) degrees.
        cell_lon: (C,) degrees.
        lat: (B,) degrees.
        lon: (B,) degrees.
        cell_ids: (B,) int64, the true cells, whose distance is d_true; None takes the nearest cell's, as PIGEON's
            released code does. Without effect if `normalised`.
        tau_km: tau; 75 in PIGEON, 65 in PIGEOTTO.
        normalised: whether each row sums to 1.

    Returns:
        (B, C) float32.
    """
    if not tau_km > 0:
        raise ValueError(f"tau_km must be positive, got {tau_km}.")
    distance_km = pairwise_km(lat, lon, cell_lat, cell_lon)
    if normalised:
        return torch.softmax(distance_km.div_(-tau_km), dim=1)
    true_km = distance_km.amin(dim=1, keepdim=True) if cell_ids is None else distance_km.gather(1, cell_ids[:, None])
    return distance_km.sub_(true_km).div_(-tau_km).exp_()


def haversine_smoothing_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -Σ_i y_i log p_i; logits and targets (B, C)."""
    if logits.shape != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape.")
    return F.cross_entropy(logits, targets)


def banded_contrastive_loss(
    vectors: Tensor, lat: Tensor, lon: Tensor, *, near_km: float, far_km: float, temperature: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Supervised contrastive loss on distance bands: near panoramas attract, far ones repel, the rest is ignored.

    Khosla et al. 2020 (arXiv 2004.11362, eq. 2), with s the cosines over the temperature: for an anchor i with the
    positives P (nearer than `near_km`) and the negatives N (farther than `far_km`),
    -1/|P| sum over p in P of (s_ip - log sum over a in P and N of exp s_ia). Rows without a positive are no anchors.

    Args:
        vectors: (B, D); brought to unit norm here.
        lat: (B,) degrees.
        lon: (B,) degrees.
        near_km: below it a pair belongs together.
        far_km: above it a pair does not.
        temperature: what cosines are divided by.

    Returns:
        The mean over the anchors (0 without any), and their number, int64.
    """
    if not 0 < near_km <= far_km:
        raise ValueError(f"near_km and far_km must be 0 < near_km <= far_km, got {near_km} and {far_km}.")
    unit = F.normalize(vectors.float(), dim=-1)
    distance_km = pairwise_km(lat, lon, lat, lon)
    others = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    positive = (distance_km < near_km) & others
    counted = positive | (distance_km > far_km)
    anchor = positive.any(dim=1)
    scores = unit @ unit.T / temperature
    log_sum = scores.masked_fill(~(counted | ~anchor[:, None]), -torch.inf).logsumexp(dim=1)
    mean_score = (scores * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    num_anchors = anchor.sum()
    return ((log_sum - mean_score) * anchor).sum() / num_anchors.clamp(min=1), num_anchors


def video_text_loss(video: Tensor, text: Tensor, temperature: float | Tensor) -> Tensor:
    """Symmetric InfoNCE as in CLIP: each video must pick its caption from the batch, and each caption its video.

    Args:
        video: (B, D) features; brought to unit norm here.
        text: (B, D) features; brought to unit norm here.
        temperature: what the cosines are divided by; a tensor if learned.
    """
    if video.shape != text.shape:
        raise ValueError(f"video {tuple(video.shape)} and text {tuple(text.shape)} differ in shape.")
    cosines = F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T
    logits = cosines / temperature
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
