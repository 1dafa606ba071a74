"""Decoding and slicing against Pillow: crop and resize of each frame, as one would write it first."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from hedwig.benchmark.timing import interleaved

__all__ = ["preprocessing_benchmark", "synthetic_panoramas"]


def preprocessing_benchmark(images: list[bytes], *, num_rounds: int = 7) -> dict[str, float]:
    """Decoding and slicing (mode 'paper') of 2:1 JPEGs against Pillow crop + resize of each frame."""
    from PIL import Image

    from hedwig.panorama import Slicing, decode_image, select_frames, slice_panorama

    slicing = Slicing(mode="paper")

    def pillow_decode(data: bytes) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def pillow_slice(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width, _ = image.shape
        rows = round(width * slicing.band_deg / 360)
        top = (height - rows) // 2
        band = Image.fromarray(image[top : top + rows])
        if rows != slicing.height_px:
            size = (round(width * slicing.height_px / rows), slicing.height_px)
            band = band.resize(size, Image.Resampling.BICUBIC)
        num_windows = (band.width - slicing.height_px) // slicing.stride_px + 1
        side = (slicing.frame_px, slicing.frame_px)
        frames = []
        for number in select_frames(num_windows, slicing.num_frames, slicing.select):
            left = int(number) * slicing.stride_px
            crop = band.crop((left, 0, left + slicing.height_px, slicing.height_px))
            frames.append(np.asarray(crop.resize(side, Image.Resampling.BICUBIC)))
        return np.stack(frames)

    decoded = [decode_image(data) for data in images]
    each = interleaved(
        {
            "pillow_decode": lambda: [pillow_decode(data) for data in images],
            "decode": lambda: [decode_image(data) for data in images],
            "pillow_slice": lambda: [pillow_slice(image) for image in decoded],
            "slice": lambda: [slice_panorama(image, slicing, projection="equirectangular") for image in decoded],
        },
        num_rounds,
    )
    whole, pillow_whole = each["decode"] + each["slice"], each["pillow_decode"] + each["pillow_slice"]
    return {
        "decode_vs_pillow": each["pillow_decode"] / each["decode"],
        "slice_vs_pillow": each["pillow_slice"] / each["slice"],
        "preprocessing_vs_pillow": pillow_whole / whole,
        "preprocessing_vs_decode_only": whole / each["decode"],
        "panoramas_per_cpu_s": len(images) / whole,
    }


def synthetic_panoramas(num: int) -> list[bytes]:
    """JPEGs of 2048 x 1024 px from the synthetic world."""
    import pandas as pd

    from hedwig.synthetic import PanoramaRenderer, World

    places = {"lat": [48.1, -33.9, 35.7, 1.3], "lon": [11.6, 18.4, 139.7, 103.8], "country": ["DE", "ZA", "JP", "SG"]}
    rows = World(pd.DataFrame({**places, "population": [10**6] * 4}), 0).rows(num, width=2048)
    batch = {str(name): rows[name].to_numpy() for name in rows.columns}
    return list(PanoramaRenderer(width=2048)(batch)["image_bytes"])
