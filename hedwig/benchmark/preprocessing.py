"""Decoding and slicing against Pillow: crop and resize of each frame, as one would write it first.

The second twin is what a user of open_clip does: Pillow decodes and crops, and the model's own transform (resize,
tensor, normalise) takes each frame. The frames are the same windows of the same panoramas in all three.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedwig.benchmark.timing import interleaved

__all__ = ["preprocessing_benchmark", "slice_figures", "synthetic_panoramas"]

BORDER_PX = 3  # columns of a frame that see its neighbours instead of a clamped edge


def preprocessing_benchmark(
    images: list[bytes], *, num_rounds: int = 7, num_frames: int | None = None
) -> dict[str, float]:
    """Decoding and slicing (mode 'paper') of 2:1 JPEGs against Pillow and against open_clip's transform.

    Args:
        images: files.
        num_rounds: medians are over so many.
        num_frames: V; None for the default.

    Returns:
        Ratios of CPU seconds; ``mean_abs_diff`` and ``max_inner_diff`` in levels of 255 to Pillow's frames, the latter
        without `BORDER_PX` columns at each side; frames and panoramas per CPU second.
    """
    from open_clip.transform import image_transform
    from PIL import Image

    from hedwig.panorama import Slicing, decode_image, select_frames, slice_panorama

    slicing = Slicing(mode="paper") if num_frames is None else Slicing(mode="paper", num_frames=num_frames)
    transform: Any = image_transform(slicing.frame_px, is_train=False)

    def pillow_decode(data: bytes) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def crops(image: NDArray[np.uint8]) -> list[Image.Image]:
        height, width, _ = image.shape
        rows = round(width * slicing.band_deg / 360)
        top = (height - rows) // 2
        band = Image.fromarray(image[top : top + rows])
        if rows != slicing.height_px:
            size = (round(width * slicing.height_px / rows), slicing.height_px)
            band = band.resize(size, Image.Resampling.BICUBIC)
        num_windows = (band.width - slicing.height_px) // slicing.stride_px + 1
        lefts = [int(n) * slicing.stride_px for n in select_frames(num_windows, slicing.num_frames, slicing.select)]
        return [band.crop((left, 0, left + slicing.height_px, slicing.height_px)) for left in lefts]

    def pillow_slice(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        side = (slicing.frame_px, slicing.frame_px)
        return np.stack([np.asarray(crop.resize(side, Image.Resampling.BICUBIC)) for crop in crops(image)])

    def ours(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return slice_panorama(image, slicing, projection="equirectangular")

    decoded = [decode_image(data) for data in images]
    each = interleaved(
        {
            "pillow_decode": lambda: [pillow_decode(data) for data in images],
            "decode": lambda: [decode_image(data) for data in images],
            "pillow_slice": lambda: [pillow_slice(image) for image in decoded],
            "slice": lambda: [ours(image) for image in decoded],
            "open_clip": lambda: [[transform(crop) for crop in crops(pillow_decode(data))] for data in images],
        },
        num_rounds,
    )
    whole, pillow_whole = each["decode"] + each["slice"], each["pillow_decode"] + each["pillow_slice"]
    diffs = np.stack([np.abs(ours(image).astype(int) - pillow_slice(image)) for image in decoded])
    return {
        "decode_vs_pillow": each["pillow_decode"] / each["decode"],
        "slice_vs_pillow": each["pillow_slice"] / each["slice"],
        "preprocessing_vs_pillow": pillow_whole / whole,
        "preprocessing_vs_open_clip": each["open_clip"] / whole,
        "preprocessing_vs_decode_only": whole / each["decode"],
        "mean_abs_diff": float(diffs.mean()),
        "max_inner_diff": float(diffs[..., BORDER_PX:-BORDER_PX, :].max()),
        "frames_per_cpu_s": len(images) * slicing.num_frames / each["slice"],
        "panoramas_per_cpu_s": len(images) / whole,
    }


def slice_figures(num_images: int = 4, *, num_rounds: int = 7, num_frames: int = 10) -> dict[str, float]:
    """What ``hedwig bench slice`` prints: the figures of `preprocessing_benchmark`, one thread, under public names."""
    import torch

    torch.set_num_threads(1)
    figures = preprocessing_benchmark(synthetic_panoramas(num_images), num_rounds=num_rounds, num_frames=num_frames)
    return {
        "frames_per_s_per_core": figures["frames_per_cpu_s"],
        "ratio_to_pillow": figures["slice_vs_pillow"],
        "mean_abs_diff": figures["mean_abs_diff"],
        "max_inner_diff": figures["max_inner_diff"],
        "preprocessing_ratio_to_open_clip": figures["preprocessing_vs_open_clip"],
        "preprocessing_ratio_to_pillow": figures["preprocessing_vs_pillow"],
        "decode_ratio_to_pillow": figures["decode_vs_pillow"],
        "panoramas_per_s_per_core": figures["panoramas_per_cpu_s"],
    }


def synthetic_panoramas(num: int, *, width: int = 2048, as_rendered: bool = False) -> list[bytes]:
    """JPEGs from the synthetic world, `width` px wide and half as high.

    They are stored as street-view services store theirs: chroma at half the resolution (4:2:0), quality 85, here some
    1.4 bits a pixel; or `as_rendered` for an experiment, with the whole chroma, which takes longer to decode.
    """
    import pandas as pd
    import simplejpeg

    from hedwig.panorama import decode_image
    from hedwig.synthetic import PanoramaRenderer, World

    places = {"lat": [48.1, -33.9, 35.7, 1.3], "lon": [11.6, 18.4, 139.7, 103.8], "country": ["DE", "ZA", "JP", "SG"]}
    rows = World(pd.DataFrame({**places, "population": [10**6] * 4}), 0).rows(num, width=width)
    batch = {str(name): rows[name].to_numpy() for name in rows.columns}
    rendered = list(PanoramaRenderer(width=width)(batch)["image_bytes"])
    if as_rendered:
        return rendered
    images = (decode_image(data) for data in rendered)
    return [simplejpeg.encode_jpeg(image, quality=85, colorspace="RGB", colorsubsampling="420") for image in images]
