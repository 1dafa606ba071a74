"""The temperature of a trained head, and what it changes: one number that divides the logits (Guo et al. 2017).

It is the one with the lowest -log p(true cell) on the validation rows of all workers. That is unimodal in the
temperature, so a grid is refined around its best point. The figures given with it are on the rows it was fitted to,
and so a little too good; those of the test split are `hedwig.evaluate`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hedwig.metrics import calibration_error
from hedwig.training.loop import gather, sum_over_workers

__all__ = ["calibration_figures", "fit_temperature"]

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]

LOG10_RANGE = (-1.5, 1.5)
NUM_POINTS, NUM_PASSES = 13, 4  # each pass narrows the range six times: the last step is 0.3 %


def fit_temperature(batches: Batches) -> float:
    """The temperature with the lowest loss, in [0.03, 32].

    Args:
        batches: gives this worker's logits (B, C) at temperature 1 and cell_ids (B,) int64, anew on each call.
    """
    low, high = LOG10_RANGE
    best = 0.0
    for _ in range(NUM_PASSES):
        points = np.linspace(low, high, NUM_POINTS)
        nll = torch.zeros(NUM_POINTS, dtype=torch.float64)
        for logits, cell_ids in batches():
            for i, point in enumerate(points):
                nll[i] += float(F.cross_entropy(logits / 10**point, cell_ids, reduction="sum"))
        at = int(sum_over_workers(nll).argmin())
        best, step = float(points[at]), (high - low) / (NUM_POINTS - 1)
        low, high = max(LOG10_RANGE[0], best - step), min(LOG10_RANGE[1], best + step)
    return float(10**best)


def calibration_figures(batches: Batches, temperature: float) -> dict[str, float]:
    """Loss and expected calibration error of the most probable cell, at temperature 1 and at `temperature`.

    Returns:
        ``val_nll_uncalibrated`` and ``val_nll`` (mean -log p(true cell), nats), ``val_ece_uncalibrated`` and
        ``val_ece`` (see `hedwig.metrics.calibration_error`).
    """
    figures = {}
    for name, divisor in (("_uncalibrated", 1.0), ("", temperature)):
        sums = torch.zeros(2, dtype=torch.float64)
        confidence, correct = [np.zeros(0)], [np.zeros(0, dtype=bool)]
        for logits, cell_ids in batches():
            sums[0] += float(F.cross_entropy(logits / divisor, cell_ids, reduction="sum"))
            sums[1] += len(cell_ids)
            prob, guess = (logits / divisor).double().softmax(dim=1).max(dim=1)
            confidence.append(prob.cpu().numpy())
            correct.append((guess == cell_ids).cpu().numpy())
        nll, num = sum_over_workers(sums).tolist()
        figures[f"val_nll{name}"] = nll / num
        ece = calibration_error(gather(np.concatenate(confidence)), gather(np.concatenate(correct)))
        figures[f"val_ece{name}"] = float(ece["ece"])
    return figures
