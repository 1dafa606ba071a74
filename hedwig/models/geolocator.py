"""The geolocator: a projection of image and caption embeddings, and a classifier over geocells.

The head of the paper is two linear layers, 1536 → 768 → 100, and that is the default form. Options of ours: the
image alone, one hidden layer, and cosine logits with a learned scale. The projection leaves with unit norm, for
retrieval; the classifier reads it before that normalisation, unless its logits are cosines. It knows nothing of
where the cells are.

With `num_frames` the image comes as the vectors of its frames, and a pool of D weights makes them one: attention of a
single learned query, softmax(q.f / 0.07) over the frames. One query needs no key matrix (q.(Kf) = (K'q).f), and no
position: a panorama is a circle, and where its first frame lies means nothing. It starts at zero, that is at the mean.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hedwig.models.shapes import shapes_only
from hedwig.models.weights import load_strict, read_state_dict

__all__ = ["Geolocator", "GeolocatorConfig"]

INITIAL_SCALE = 1 / 0.07  # CLIP's


@dataclass(frozen=True)
class GeolocatorConfig:
    """The form of a geolocator.

    Attributes:
        image_dim: dimension of the image embedding.
        text_dim: dimension of the text embedding.
        use_text: whether the caption is read at all; without it the text embedding is ignored.
        projection_dim: dimension of the projected embedding, the one that is indexed.
        num_cells: C, the geocells.
        cosine: logits are cosines times a learned scale (starting at 1/0.07) instead of a linear layer's.
        temperature: what the logits are divided by; 1 while training, another value calibrates afterwards.
        hidden_dim: width of a GELU layer before the projection; 0 for none, as in the paper.
        num_frames: V, the frames whose vectors are pooled; 0 for none: the image is one vector.
    """

    image_dim: int
    text_dim: int
    use_text: bool
    projection_dim: int
    num_cells: int
    cosine: bool = False
    temperature: float = 1.0
    hidden_dim: int = 0
    num_frames: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("image_dim", 1),
            ("text_dim", int(self.use_text)),
            ("projection_dim", 1),
            ("num_cells", 1),
            ("hidden_dim", 0),
            ("num_frames", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}.")


class Geolocator(nn.Module):
    """Embeddings to a projected embedding and logits over geocells."""

    def __init__(self, config: GeolocatorConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Parameter(torch.zeros(config.image_dim)) if config.num_frames else None
        input_dim = config.image_dim + (config.text_dim if config.use_text else 0)
        self.hidden = nn.Linear(input_dim, config.hidden_dim) if config.hidden_dim else None
        self.projection = nn.Linear(config.hidden_dim or input_dim, config.projection_dim)
        self.classifier = nn.Linear(config.projection_dim, config.num_cells, bias=not config.cosine)
        self.log_scale = nn.Parameter(torch.tensor(INITIAL_SCALE).log()) if config.cosine else None
        self._knows_directions = False  # whether the classifier of cosines has unit vectors

    def forward(self, image: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Project and classify.

        Args:
            image: (B, Di) image embeddings of unit norm, or (B, V, Di) those of the frames if they are pooled.
            text: (B, Dt) text embeddings of unit norm, zeros for panoramas without a caption; may be None if the
                geolocator does not read text.

        Returns:
            projected (B, P) of unit norm, and logits (B, C).
        """
        x = self._input(image, text)
        if self.hidden is not None:
            x = F.gelu(self.hidden(x))
        projection: Tensor = self.projection(x)
        projected = F.normalize(projection, dim=-1)
        if self.log_scale is None:
            logits: Tensor = self.classifier(projection)
        else:
            scale = self.log_scale.exp().clamp(max=100.0)  # CLIP's bound: beyond it training diverges
            logits = scale * self._cosines(projected)
        return projected, logits / self.config.temperature

    def pool(self, image: Tensor) -> Tensor:
        """One unit vector per panorama, (B, Di): of (B, V, Di) frames by attention, of (B, Di) the vector itself."""
        dim, num_frames = self.config.image_dim, self.config.num_frames
        if tuple(image.shape[1:]) != ((num_frames, dim) if num_frames else (dim,)):
            raise ValueError(
                f"image must be (B, {f'{num_frames}, ' if num_frames else ''}{dim}), got {tuple(image.shape)}; was "
                f"this geolocator trained on another encoder, fusion or number of frames?"
            )
        if self.query is None:
            return image
        weights = (INITIAL_SCALE * (image @ self.query)).softmax(dim=1)
        return F.normalize((weights[:, :, None] * image).sum(dim=1), dim=-1)

    def with_layers(self, make: Callable[[Tensor, Tensor | None], nn.Module]) -> Geolocator:
        """The same for inference alone, its linear layers made anew.

        Args:
            make: given (out, in) weights and a bias, or None, a module that does what `nn.Linear` does. Of cosines it
                is given the unit vectors of the geocells: to make them takes longer than to multiply with them.
        """
        other = copy.copy(self)  # with dictionaries of its own for what is exchanged
        other._parameters = {
            name: None if one is None else nn.Parameter(one.detach(), requires_grad=False)
            for name, one in self._parameters.items()
        }
        other._modules = {}
        for name, child in self.named_children():
            layer = cast("nn.Linear", child)
            weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
            if layer is self.classifier and self.config.cosine and not self._knows_directions:
                weight = F.normalize(weight, dim=-1)
            other.add_module(name, make(weight, bias))
        other._knows_directions = self.config.cosine
        return other.eval()

    def _cosines(self, projected: Tensor) -> Tensor:
        """(B, C), with the unit vectors of the geocells."""
        if self._knows_directions:
            cosines: Tensor = self.classifier(projected)
            return cosines
        return F.linear(projected, F.normalize(self.classifier.weight, dim=-1))

    def _input(self, image: Tensor, text: Tensor | None) -> Tensor:
        image = self.pool(image)
        if not self.config.use_text:
            return image
        if text is None or tuple(text.shape) != (len(image), self.config.text_dim):
            raise ValueError(
                f"text must be ({len(image)}, {self.config.text_dim}), got "
                f"{None if text is None else tuple(text.shape)}; rows without a caption take zeros."
            )
        return torch.cat([image, text], dim=-1)

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors and model.json into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        card = json.dumps({"kind": "geolocator", "config": asdict(self.config)}, indent=2)
        (folder / "model.json").write_text(card + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Geolocator:
        """A geolocator in evaluation mode, as `save` wrote it.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: model.json is not a geolocator's, or the weights do not fit it.
        """
        folder = Path(folder)
        card = folder / "model.json"
        if not card.is_file():
            raise FileNotFoundError(f"No geolocator in {str(folder)!r}: model.json is missing. Train one first.")
        try:
            config = GeolocatorConfig(**json.loads(card.read_text(encoding="utf-8"))["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(card)!r} does not describe a geolocator: {error}") from error
        with shapes_only():
            model = cls(config)
        load_strict(model, read_state_dict(folder / "model.safetensors"), origin=str(folder / "model.safetensors"))
        return model.to(device).eval()
