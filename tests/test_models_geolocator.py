"""The geolocator head: its layers by hand, its options, and its files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hedwig.models.geolocator import Geolocator, GeolocatorConfig

PAPER = GeolocatorConfig(image_dim=768, text_dim=768, use_text=True, projection_dim=768, num_cells=100)
SMALL = GeolocatorConfig(image_dim=6, text_dim=4, use_text=True, projection_dim=5, num_cells=7)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(3, 6, generator=generator), torch.randn(3, 4, generator=generator)
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def build(config: GeolocatorConfig, seed: int = 0) -> Geolocator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Geolocator(config).eval()


def test_paper_is_1536_to_768_to_100() -> None:
    shapes = {key: tuple(value.shape) for key, value in build(PAPER).state_dict().items()}
    assert shapes == {
        "projection.weight": (768, 1536),
        "projection.bias": (768,),
        "classifier.weight": (100, 768),
        "classifier.bias": (100,),
    }


def test_linear_head_by_hand(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = build(SMALL)
    image, text = inputs
    projected, logits = model(image, text)
    s = model.state_dict()
    for b in range(3):
        x = torch.cat([image[b], text[b]])  # the image first
        z = s["projection.weight"] @ x + s["projection.bias"]
        torch.testing.assert_close(projected[b], z / z.norm())
        torch.testing.assert_close(logits[b], s["classifier.weight"] @ z + s["classifier.bias"])


def test_hidden_layer_and_cosine_by_hand(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = build(replace(SMALL, hidden_dim=9, cosine=True, temperature=2.0))
    image, text = inputs
    projected, logits = model(image, text)
    s = model.state_dict()
    x = torch.cat([image, text], dim=1)
    z = F.gelu(x @ s["hidden.weight"].T + s["hidden.bias"]) @ s["projection.weight"].T + s["projection.bias"]
    torch.testing.assert_close(projected, z / z.norm(dim=1, keepdim=True))
    cosines = torch.stack([F.cosine_similarity(z, w[None]) for w in s["classifier.weight"]], dim=1)
    torch.testing.assert_close(logits, cosines / 0.07 / 2.0, atol=1e-5, rtol=1e-5)
    assert "classifier.bias" not in s


def test_learned_scale_is_bounded(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = build(replace(SMALL, cosine=True))
    with torch.no_grad():
        model.log_scale.fill_(math.log(1e6))
    assert model(*inputs)[1].abs().max() <= 100.0


def test_temperature_divides_the_logits(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    cold, warm = build(SMALL), build(replace(SMALL, temperature=4.0))
    torch.testing.assert_close(cold(*inputs)[1], 4 * warm(*inputs)[1])
    torch.testing.assert_close(cold(*inputs)[0], warm(*inputs)[0])


def test_image_alone_ignores_the_text(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = build(replace(SMALL, use_text=False))
    image, text = inputs
    assert model.projection.in_features == 6
    assert torch.equal(model(image)[1], model(image, text)[1])
    with_text = build(SMALL)
    assert (with_text(image, text)[1] - with_text(image, -text)[1]).abs().max() > 1e-3


def test_other_dimensions_are_refused(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = build(SMALL)
    image, text = inputs
    with pytest.raises(ValueError, match=r"image must be \(B, 6\), got \(3, 4\)"):
        model(text, text)
    with pytest.raises(ValueError, match=r"text must be \(3, 4\), got None"):
        model(image)
    with pytest.raises(ValueError, match=r"text must be \(3, 4\), got \(2, 4\)"):
        model(image, text[:2])


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, cosine=True, hidden_dim=8, temperature=1.5)])
def test_round_trip(tmp_path: Path, inputs: tuple[torch.Tensor, torch.Tensor], config: GeolocatorConfig) -> None:
    model = build(config, seed=4)
    model.save(tmp_path / "geolocator")
    assert sorted(p.name for p in (tmp_path / "geolocator").iterdir()) == ["model.json", "model.safetensors"]
    loaded = Geolocator.load(tmp_path / "geolocator")
    assert loaded.config == config
    assert not loaded.training
    for a, b in zip(model(*inputs), loaded(*inputs), strict=True):
        assert torch.equal(a, b)
    assert all(p.requires_grad for p in loaded.parameters())


def test_loading_is_strict(tmp_path: Path) -> None:
    build(SMALL).save(tmp_path)
    card = json.loads((tmp_path / "model.json").read_text())
    card["config"]["num_cells"] = 8
    (tmp_path / "model.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"classifier.weight \(7, 5\) instead of \(8, 5\)"):
        Geolocator.load(tmp_path)
    card["config"]["colour"] = "red"
    (tmp_path / "model.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="colour"):
        Geolocator.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model.json is missing"):
        Geolocator.load(tmp_path / "nowhere")


def test_config_refuses_impossible_values() -> None:
    with pytest.raises(ValueError, match="num_cells must be at least 1, got 0"):
        replace(SMALL, num_cells=0)
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, got 0\.0"):
        replace(SMALL, temperature=0.0)
    with pytest.raises(ValueError, match="text_dim must be at least 1"):
        replace(SMALL, text_dim=0)
    assert replace(SMALL, text_dim=0, use_text=False).text_dim == 0


def test_pool_by_hand_and_without_order() -> None:
    model = build(replace(SMALL, num_frames=3, hidden_dim=8, cosine=True))
    generator = torch.Generator().manual_seed(1)
    frames = F.normalize(torch.randn(2, 3, 6, generator=generator), dim=-1)
    text = F.normalize(torch.randn(2, 4, generator=generator), dim=-1)
    assert model.query is not None
    # A new pool is the mean.
    torch.testing.assert_close(model.pool(frames), F.normalize(frames.mean(dim=1), dim=-1))
    with torch.no_grad():
        model.query.copy_(0.3 * torch.randn(6, generator=generator))
    for b in range(2):
        weights = torch.tensor([math.exp(float(model.query.detach() @ frames[b, v]) / 0.07) for v in range(3)])
        pooled = sum(weights[v] / weights.sum() * frames[b, v] for v in range(3))
        torch.testing.assert_close(model.pool(frames)[b], pooled / pooled.norm())
    plain = build(replace(SMALL, hidden_dim=8, cosine=True))
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key != "query"})
    for pooled_head, plain_head in zip(model(frames, text), plain(model.pool(frames), text), strict=True):
        torch.testing.assert_close(pooled_head, plain_head)
    for turned in (frames.roll(1, dims=1), frames.flip(1)):  # a panorama is a circle
        torch.testing.assert_close(model(turned, text)[1], model(frames, text)[1])


def test_pool_of_another_number_of_frames_is_refused(tmp_path: Path) -> None:
    model = build(replace(SMALL, use_text=False, num_frames=3))
    with pytest.raises(ValueError, match=r"image must be \(B, 3, 6\), got \(2, 4, 6\)"):
        model(torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match=r"image must be \(B, 3, 6\), got \(2, 6\)"):
        model(torch.zeros(2, 6))
    model.save(tmp_path)
    assert Geolocator.load(tmp_path).config.num_frames == 3
    card = json.loads((tmp_path / "model.json").read_text())
    del card["config"]["num_frames"]  # a head made before there were pools has none
    (tmp_path / "model.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="query"):
        Geolocator.load(tmp_path)
    build(SMALL).save(tmp_path / "old")
    card = json.loads((tmp_path / "old" / "model.json").read_text())
    del card["config"]["num_frames"]
    (tmp_path / "old" / "model.json").write_text(json.dumps(card))
    assert Geolocator.load(tmp_path / "old").config == SMALL


@pytest.mark.parametrize("cosine", [False, True])
def test_layers_are_exchanged_for_inference_and_the_original_stays(
    cosine: bool, inputs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model, given = build(replace(SMALL, hidden_dim=9, cosine=cosine, num_frames=0)), []

    class Layer(torch.nn.Module):
        def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            super().__init__()
            self.weight, self.bias = weight, bias
            given.append((tuple(weight.shape), weight.requires_grad, bias is None))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight, self.bias)

    other = model.with_layers(Layer)
    assert given == [((9, 10), False, False), ((5, 9), False, False), ((7, 5), False, cosine)]
    for ours, theirs in zip(other(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    if cosine:
        torch.testing.assert_close(other.classifier.weight.norm(dim=-1), torch.ones(7))
        again = other.with_layers(Layer)
        assert again.classifier.weight is not model.classifier.weight
        torch.testing.assert_close(again(*inputs)[1], model(*inputs)[1])
    assert not any(p.requires_grad for p in other.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert isinstance(model.projection, torch.nn.Linear)
    model(*inputs)[1].sum().backward()
    assert model.classifier.weight.grad is not None
