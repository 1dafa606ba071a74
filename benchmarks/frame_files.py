"""Cut panoramas into frame files, which is what a tool that knows only square pictures has to be given first.

JPEG of quality 95, so that the second coding costs little of the picture; the files are three times the panoramas.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

NUM_FRAMES, BAND_DEG = 8, 112.5


def cut_frames(image: Image.Image) -> list[Image.Image]:
    """Eight square frames of a 2:1 panorama, evenly spaced around its middle band, which closes on itself."""
    side, step = round(image.width * BAND_DEG / 360), image.width // NUM_FRAMES
    band = image.crop((0, (image.height - side) // 2, image.width, (image.height + side) // 2))
    wrapped = Image.new("RGB", (image.width + side, side))
    wrapped.paste(band, (0, 0))
    wrapped.paste(band.crop((0, 0, side, side)), (image.width, 0))
    return [wrapped.crop((i * step, 0, i * step + side, side)) for i in range(NUM_FRAMES)]


if __name__ == "__main__":
    images, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True)
    for path in sorted(images.glob("*.jpg")):
        with Image.open(path) as image:
            for number, frame in enumerate(cut_frames(image.convert("RGB"))):
                frame.save(out / f"{path.stem}-{number}.jpg", quality=95)
