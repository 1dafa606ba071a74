"""Ratios of hedwig's fast paths to what a user would write instead, on synthetic input, measured in one run.

    make bench          (or: python -m hedwig.benchmark --json)

Machines are noisy and differ, so every figure is measured interleaved with its twin in the same process and given as a
ratio of CPU seconds. Nothing here asserts a speed; `tests/` asserts that both ways agree.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["embedding_benchmark", "index_benchmark", "main", "preprocessing_benchmark", "table_benchmark"]


def _interleaved(steps: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, float]:
    """Median CPU seconds of each step over `num_rounds`, one after the other in every round; the first is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


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
    each = _interleaved(
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


def embedding_benchmark(name: str = "viclip-tiny", *, batch_size: int = 16, num_rounds: int = 5) -> dict[str, float]:
    """Forward passes of one encoder: bfloat16 against float32 weights, and the cosine between their answers."""
    from hedwig.models.encoder import load_encoder

    exact, half = (load_encoder(name, seed=0, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    shape = (batch_size, exact.num_frames, exact.frame_px, exact.frame_px, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    each = _interleaved(
        {"float32": lambda: exact.encode_frames(frames), "bfloat16": lambda: half.encode_frames(frames)}, num_rounds
    )
    cosine = (exact.encode_frames(frames) * half.encode_frames(frames)).sum(axis=1)
    return {
        "bfloat16_vs_float32": each["float32"] / each["bfloat16"],
        "min_cosine": float(cosine.min()),
        "float32_panoramas_per_cpu_s": batch_size / each["float32"],
    }


def index_benchmark(
    num: int = 100_000, dim: int = 256, *, num_cells: int = 1000, num_rounds: int = 5
) -> dict[str, float]:
    """Cell-then-neighbour search by the geocell index (fp16) against one matrix product with every reference."""
    from hedwig.index import GeocellIndex, exact_search

    rng = np.random.default_rng(0)
    sizes = rng.pareto(1.2, num_cells) + 0.2
    cells = rng.choice(num_cells, num, p=sizes / sizes.sum())
    vectors = rng.standard_normal((num, dim), dtype=np.float32) + rng.standard_normal((num_cells, dim))[cells]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    places = np.zeros(num)
    names = [f"{i:08d}" for i in range(num)]
    index = GeocellIndex.build(vectors, cells, names, places, places, num_cells=num_cells)
    some = rng.choice(num, 64, replace=False)
    queries = vectors[some] + 0.1 * rng.standard_normal((64, dim)).astype(np.float32)
    asked = np.column_stack([cells[some], rng.integers(0, num_cells, (64, 4))])
    asked[:, 1:][asked[:, 1:] == asked[:, :1]] = -1

    def one_by_one() -> None:
        for query, some_cells in zip(queries, asked, strict=True):
            index.search(query[None], some_cells[None], 5, num_threads=1)

    def brute_force() -> None:
        for query in queries:
            np.argmax(vectors @ query)

    each = _interleaved({"index": one_by_one, "brute_force": brute_force}, num_rounds)
    found, _ = index.search(queries, asked, 1)
    order = np.lexsort((np.array(names), cells))
    exact, _ = exact_search(queries, asked, vectors[order], cells[order], 1)
    return {
        "index_vs_brute_force": each["brute_force"] / each["index"],
        "recall_at_1_in_cells": float((found[:, 0] == exact[:, 0]).mean()),
        "index_ms_per_query": 1000 * each["index"] / len(queries),
    }


def table_benchmark(num: int = 50_000, dim: int = 768, *, num_rounds: int = 3) -> dict[str, float]:
    """Writing vectors as plain Parquet lists, as our tables do, against pyarrow's default (dictionary, snappy)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.random.default_rng(0).standard_normal(num * dim, dtype=np.float32))
    table = pa.table({"v": pa.FixedSizeListArray.from_arrays(flat, dim)})

    def write(**options: Any) -> None:
        pq.write_table(table, pa.BufferOutputStream(), **options)

    each = _interleaved(
        {"plain": lambda: write(use_dictionary=False, compression="NONE"), "default": lambda: write()}, num_rounds
    )
    return {"plain_write_vs_default": each["default"] / each["plain"]}


def _synthetic_panoramas(num: int) -> list[bytes]:
    import pandas as pd

    from hedwig.synthetic import PanoramaRenderer, World

    places = {"lat": [48.1, -33.9, 35.7, 1.3], "lon": [11.6, 18.4, 139.7, 103.8], "country": ["DE", "ZA", "JP", "SG"]}
    rows = World(pd.DataFrame({**places, "population": [10**6] * 4}), 0).rows(num, width=2048)
    batch = {str(name): rows[name].to_numpy() for name in rows.columns}
    return list(PanoramaRenderer(width=2048)(batch)["image_bytes"])


def main(arguments: list[str] | None = None) -> None:
    """Print every benchmark; ``--json`` for machines."""
    parser = argparse.ArgumentParser(prog="python -m hedwig.benchmark", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    results = {
        "preprocessing of 2048 x 1024 synthetic panoramas": preprocessing_benchmark(_synthetic_panoramas(4)),
        "viclip-tiny forward, one thread": embedding_benchmark(),
        "search among 100,000 x 256 in 1,000 cells, one thread": index_benchmark(),
        "Parquet vectors 50,000 x 768": table_benchmark(),
    }
    if options.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
        return
    for title, figures in results.items():
        sys.stdout.write(f"{title}\n")
        for name, value in figures.items():
            sys.stdout.write(f"  {name:<30} {value:,.4g}\n")


if __name__ == "__main__":
    main()
