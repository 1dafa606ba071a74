"""What one would write in an afternoon instead: a Dataset, a DataLoader, Pillow, open_clip, and a .npy at the end.

It reads JPEG panoramas, cuts eight square frames around each one's middle band, runs open_clip's own transform and
model, and writes the mean of the frames' vectors. No state is kept: what dies halfway begins again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from frame_files import NUM_FRAMES, cut_frames
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Panoramas(Dataset[torch.Tensor]):
    """(V, 3, S, S) float32 frames of each file."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        with Image.open(self.paths[row]) as image:
            return torch.stack([self.transform(frame) for frame in cut_frames(image.convert("RGB"))])


def main(arguments: list[str] | None = None) -> None:
    """Embed a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="folder of .jpg panoramas")
    parser.add_argument("out", type=Path, help="folder for embeddings.npy and names.txt")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip architecture")
    parser.add_argument("--weights", required=True, help="file")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8, help="panoramas at once")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes")
    asked = parser.parse_args(arguments)
    model, _, transform = open_clip.create_model_and_transforms(asked.model, pretrained=asked.weights)
    model, dtype = model.to(asked.device, getattr(torch, asked.dtype)).eval(), getattr(torch, asked.dtype)
    paths = sorted(asked.images.glob("*.jpg"))
    cuda = asked.device == "cuda"
    loader = DataLoader(Panoramas(paths, transform), asked.batch, num_workers=asked.workers, pin_memory=cuda)
    vectors = []
    with torch.inference_mode():
        for frames in loader:
            pixels = frames.flatten(0, 1).to(asked.device, dtype, non_blocking=True)
            each = torch.nn.functional.normalize(model.encode_image(pixels).float(), dim=-1)
            mean = each.reshape(len(frames), NUM_FRAMES, -1).mean(dim=1)
            vectors.append(torch.nn.functional.normalize(mean, dim=-1).cpu().numpy())
    asked.out.mkdir(parents=True, exist_ok=True)
    np.save(asked.out / "embeddings.npy", np.concatenate(vectors))
    (asked.out / "names.txt").write_text("\n".join(path.stem for path in paths) + "\n")


if __name__ == "__main__":
    main()
