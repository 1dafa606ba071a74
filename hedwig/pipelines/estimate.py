"""What a run would cost, before it runs: rows, bytes, frames, actors, and a time measured on a few of its images."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from hedwig import storage
from hedwig.config import Experiment
from hedwig.pipelines import plan
from hedwig.pipelines.checks import keeps_frames, weights_of
from hedwig.pipelines.encode import slicing_of
from hedwig.pipelines.run import STAGE_FOLDERS, Run
from hedwig.sources import check_listing, read_image, read_listing

__all__ = ["estimate"]

NUM_PROBES = 6


def estimate(x: Experiment, first: str | None = None, last: str | None = None) -> dict[str, Any]:
    """The outlook of ``hedwig run --dry-run``; reads the listing and a few images, writes nothing.

    Returns:
        Name -> text or number. The time is that of slicing, captioning and embedding on this machine's CPU, from a
        measurement made now; training and evaluation come on top.
    """
    run = Run(x)
    stages = plan(x, first, last)
    there = [name for name in stages if storage.read_manifest(run.folder(name)) is not None]
    outlook: dict[str, Any] = {"output": storage.resolve(x.output), "stages": ", ".join(stages)}
    outlook["already there"] = ", ".join(there) or "nothing"
    if x.data.panoramas is None:
        num = x.data.synthetic.num if x.data.synthetic else 0
        return {**outlook, "panoramas": f"{num} (synthetic, to be rendered)", **_work(x, num)}
    listing = storage.resolve(x.data.panoramas)
    root = storage.resolve(x.data.image_root) if x.data.image_root else os.path.dirname(listing)
    checked = check_listing(read_listing(listing), image_root=root, layout=x.data.layout)
    uris = checked.panoramas["image_uri"].to_pylist()
    outlook["panoramas"] = f"{len(uris)} of {checked.num_in} rows, {checked.rejected.num_rows} rejected"
    if checked.reasons:
        outlook["reasons"] = "; ".join(f"{count} x {reason}" for reason, count in checked.reasons.items())
    sizes, seconds = _probe(x, run, uris)
    if sizes:
        outlook["bytes in"] = f"{np.mean(sizes) * checked.num_images / 1e6:.0f} MB (from {len(sizes)} images)"
        in_all = 2 * np.mean(seconds) * len(uris) / max(1, x.embed.num_actors)  # caption and embed both decode
        outlook["slicing"] = f"{in_all:.0f} s on {x.embed.num_actors} actors (from {len(seconds)} images)"
    return {**outlook, **_work(x, len(uris))}


def _work(x: Experiment, num: int) -> dict[str, Any]:
    from hedwig.models.encoder import ENCODER_NAMES, load_encoder

    num_frames = x.slicing.num_frames
    weights = None if x.encoder.name in ENCODER_NAMES else weights_of(x.encoder)
    encoder = load_encoder(
        x.encoder.name,
        weights=weights,
        quick_gelu=None if weights is None else x.encoder.quick_gelu,
        seed=x.encoder.seed,
        device=x.encoder.device,
        fusion=x.encoder.fusion,
        temporal=x.encoder.temporal,
    )
    frames = np.zeros((1, num_frames, encoder.frame_px, encoder.frame_px, 3), dtype=np.uint8)
    encoder.encode_frames(frames)
    began = time.perf_counter()
    encoder.encode_frames(frames)
    seconds = (time.perf_counter() - began) * num / max(1, x.embed.num_actors)
    vectors = 1 + (num_frames if keeps_frames(encoder.fusion) else 0)
    stored = num * (vectors * encoder.image_dim + encoder.text_dim) * 4
    return {
        "frames": f"{num * num_frames} of {encoder.frame_px} px",
        "actors": f"{x.embed.num_actors} to {x.embed.max_actors or x.embed.num_actors} of {x.embed.num_cpus:g} CPU, "
        f"{x.embed.num_gpus:g} GPU",
        "embedding": f"{seconds:.0f} s with {encoder.name} (one panorama at a time here; batches are faster)",
        "bytes out": f"{stored / 1e6:.0f} MB of vectors in {STAGE_FOLDERS['embed']}/",
    }


def _probe(x: Experiment, run: Run, uris: list[str]) -> tuple[list[int], list[float]]:
    """Sizes of a few images and the seconds to decode and slice them; unreadable ones are left out."""
    from hedwig.panorama import decode_image, slice_panorama

    slicing = slicing_of(run, x.encoder)
    sizes, seconds = [], []
    for uri in uris[:: max(1, len(uris) // NUM_PROBES)][:NUM_PROBES]:
        try:
            data = read_image(uri)
            began = time.perf_counter()
            slice_panorama(decode_image(data), slicing, projection="equirectangular", heading=float("nan"))
        except (OSError, ValueError):
            continue
        sizes.append(len(data))
        seconds.append(time.perf_counter() - began)
    return sizes, seconds
