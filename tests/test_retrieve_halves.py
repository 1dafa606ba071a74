"""A geolocator in halves: the same as one whose weights were rounded, however many ask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hedwig.index import kernel
from hedwig.models.geolocator import Geolocator, GeolocatorConfig
from hedwig.retrieve.halves import HalfLinear, in_halves

FORMS: list[dict[str, Any]] = [
    {"use_text": False},
    {"use_text": True},
    {"use_text": True, "hidden_dim": 70},
    {"use_text": True, "cosine": True, "temperature": 1.7},
    {"use_text": False, "cosine": True, "num_frames": 3},
]


def build(**form: Any) -> Geolocator:
    torch.manual_seed(1)
    return Geolocator(GeolocatorConfig(image_dim=48, text_dim=40, projection_dim=33, num_cells=90, **form)).eval()


def rows(num: int, num_frames: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num)
    shape = (num, num_frames, 48) if num_frames else (num, 48)
    image = F.normalize(torch.randn(shape, generator=generator), dim=-1)
    return image, F.normalize(torch.randn(num, 40, generator=generator), dim=-1)


def rounded(model: Geolocator) -> Geolocator:
    return model.with_layers(lambda weight, bias: linear(weight.half().float(), bias))


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return layer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_kernel", [True, False])
def test_few_and_many_rows_are_those_of_rounded_weights(
    monkeypatch: pytest.MonkeyPatch, form: dict[str, Any], has_kernel: bool
) -> None:
    if not has_kernel:
        monkeypatch.setattr(kernel, "is_available", lambda: False)
    model = build(**form)
    halves, plain = in_halves(model), rounded(model)
    for num in (0, 1, 5, 12, 13, 40):
        given = rows(num, form.get("num_frames", 0))
        with torch.inference_mode():
            for ours, theirs in zip(halves(*given), plain(*given), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_rounding_moves_no_logit_by_more_than_three_thousandths_of_their_deviation() -> None:
    model, given = build(use_text=True), rows(200)
    with torch.inference_mode():
        exact, found = model(*given)[1], in_halves(model)(*given)[1]
    assert 0 < float((found - exact).abs().max()) < 3e-3 * float(exact.std())
    assert float((found.argmax(1) == exact.argmax(1)).float().mean()) > 0.99


@pytest.mark.skipif(not kernel.is_available(), reason="there is no kernel for this processor")
def test_one_row_has_the_same_bits_alone_and_among_a_few() -> None:
    layer = HalfLinear(torch.randn(90, 48), torch.randn(90))
    x = torch.randn(12, 48)
    alone = torch.cat([layer(x[b : b + 1]) for b in range(12)])
    assert torch.equal(alone, layer(x))
    assert layer(x[:, ::1].T.contiguous().T).numpy().tobytes() == np.asarray(alone).tobytes()


def test_weights_that_do_not_fit_are_refused_and_gradients_pass() -> None:
    with pytest.raises(ValueError, match="70000 does not fit into fp16"):
        HalfLinear(torch.tensor([[1.0, 70_000.0]]), None)
    x = torch.ones(2, 3, requires_grad=True)
    HalfLinear(torch.full((4, 3), 0.5), torch.zeros(4))(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0] * 3] * 2
