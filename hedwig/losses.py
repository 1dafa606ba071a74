"""Losses: cross entropy over geocells, haversine smoothing, and the contrastive loss between videos and captions.

Haversine smoothing is PIGEON's (arXiv 2307.05845, eq. 1-2): near cells are less wrong than far ones. As published its
targets do not sum to one, and the sum, so the weight of the loss, drifts with the number of cells (about 1.2 at 100
cells and 5 at 2000); `normalised` removes that. Plain functions of tensors; the distance is `hedwig.geo`'s formula in
torch, so that targets are made on the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hedwig.geo import EARTH_RADIUS_KM

__all__ = [
    "cross_entropy",
    "haversine_km",
    "haversine_smoothing_loss",
    "haversine_targets",
    "video_text_loss",
]


def cross_entropy(logits: Tensor, cell_ids: Tensor) -> Tensor:
    """Mean of -log p(true cell).

    Args:
        logits: (B, C).
        cell_ids: (B,) int64 in [0, C).
    """
    return F.cross_entropy(logits, cell_ids)


def haversine_km(lat1: Tensor, lon1: Tensor, lat2: Tensor, lon2: Tensor) -> Tensor:
    """Great-circle distance in km, float64; arguments in degrees, broadcast. `hedwig.geo.haversine_km` in torch."""
    lat1, lon1, lat2, lon2 = (torch.deg2rad(a.double()) for a in (lat1, lon1, lat2, lon2))
    half_chord_sq = (
        torch.sin((lat2 - lat1) / 2) ** 2 + torch.cos(lat1) * torch.cos(lat2) * torch.sin((lon2 - lon1) / 2) ** 2
    )
    return 2 * EARTH_RADIUS_KM * torch.asin(half_chord_sq.clamp(0.0, 1.0).sqrt())


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
    distance_km = haversine_km(lat[:, None], lon[:, None], cell_lat[None], cell_lon[None])
    if normalised:
        return torch.softmax(-distance_km / tau_km, dim=1).float()
    nearest_km = distance_km.amin(dim=1, keepdim=True)
    true_km = nearest_km if cell_ids is None else distance_km.gather(1, cell_ids[:, None])
    return torch.exp(-(distance_km - true_km) / tau_km).float()


def haversine_smoothing_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -Σ_i y_i log p_i; logits and targets (B, C)."""
    if logits.shape != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape.")
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


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
