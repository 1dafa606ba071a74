"""The temperature against the one that made the labels, and the figures against those of a slow twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hedwig.metrics import calibration_error
from hedwig.training.calibration import calibration_figures, fit_temperature


def labelled(temperature: float, num: int = 10_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, 8), and cells drawn from their softmax at `temperature`: dividing by it is what calibrates."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num, 8, generator=generator)
    return logits, torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("true", [0.4, 1.0, 5.0])
def test_the_temperature_is_the_one_that_made_the_labels(true: float) -> None:
    logits, cells = labelled(true)

    def batches():
        return zip(logits.split(4000), cells.split(4000), strict=True)

    found = fit_temperature(batches)
    assert found == pytest.approx(true, rel=0.05)
    fine = np.geomspace(true / 1.2, true * 1.2, 100)
    nll = [torch.nn.functional.cross_entropy(logits.double() / t, cells).item() for t in fine]
    assert found == pytest.approx(fine[int(np.argmin(nll))], rel=0.008)
    figures = calibration_figures(batches, found)
    assert figures["val_nll"] == pytest.approx(min(nll), abs=1e-4)
    assert figures["val_nll_uncalibrated"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, cells).item(), rel=1e-5
    )
    probs = (logits.double() / found).softmax(dim=1)
    ece = calibration_error(probs.amax(dim=1).numpy(), (probs.argmax(dim=1) == cells).numpy())["ece"]
    assert figures["val_ece"] == pytest.approx(ece, abs=1e-6)
    assert figures["val_ece"] < 0.015
    if true != 1.0:
        assert figures["val_ece_uncalibrated"] > 4 * figures["val_ece"]


def test_the_range_is_bounded() -> None:
    logits = torch.eye(4).repeat(5, 1)
    right, wrong = torch.arange(4).repeat(5), (torch.arange(4) + 1).repeat(5) % 4
    assert fit_temperature(lambda: [(logits, right)]) == pytest.approx(10**-1.5, rel=0.01)
    assert fit_temperature(lambda: [(logits, wrong)]) == pytest.approx(10**1.5, rel=0.01)
