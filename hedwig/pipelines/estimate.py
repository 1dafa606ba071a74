"""What a run would cost, before it runs: a calibration of seconds on the spot, and what follows from it.

A few of the listing's images (or of the synthetic world's) are read, decoded and sliced here, and the encoder is timed
on this device, unless a rate is stated or the work of a clip is counted for a named GPU. The arithmetic is that of
`hedwig.planning`; here is only what needs the experiment. Nothing is written. Where the run has been made already, the
plan for its own actors stands beside what its manifest says it took.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hedwig import storage
from hedwig.config import Experiment
from hedwig.pipelines.checks import keeps_frames, sizes_of, weights_of
from hedwig.pipelines.encode import slicing_of
from hedwig.pipelines.experiment import plan
from hedwig.pipelines.run import STAGE_FOLDERS, Run
from hedwig.planning import Fleet, Outlook, Rates, clips_per_s_of, node_fleet, outlook, simulate
from hedwig.sources import check_listing, read_image, read_listing

__all__ = ["calibrate", "compare", "estimate", "local_fleet", "num_panoramas"]

NUM_PROBES = 6
NUM_RENDERED = 2
OTHER_COLUMNS_BYTES = 300  # ids, position, caption and hash of a row, packed


def estimate(x: Experiment, first: str | None = None, last: str | None = None) -> dict[str, Any]:
    """The outlook of ``hedwig run --dry-run``; reads the listing and a few images, writes nothing.

    Returns:
        Name -> text. The time is that of captioning and embedding with this run's actors on this machine; training and
        evaluation come on top.
    """
    run = Run(x)
    stages = plan(x, first, last)
    there = [name for name in stages if storage.read_manifest(run.folder(name)) is not None]
    text: dict[str, Any] = {"output": storage.resolve(x.output), "stages": ", ".join(stages)}
    text["already there"] = ", ".join(there) or "nothing"
    if x.data.panoramas is None:
        num, uris = (x.data.synthetic.num if x.data.synthetic else 0), []
        text["panoramas"] = f"{num} (synthetic, to be rendered)"
    else:
        checked = _checked(x)
        uris = checked.panoramas["image_uri"].to_pylist()
        num = len(uris)
        text["panoramas"] = f"{num} of {checked.num_in} rows, {checked.rejected.num_rows} rejected"
        if checked.reasons:
            text["reasons"] = "; ".join(f"{count} x {reason}" for reason, count in checked.reasons.items())
    spec, pool = sizes_of(x.encoder), x.embed
    text["frames"] = f"{num * x.slicing.num_frames} of {spec.frame_px} px"
    text["actors"] = (
        f"{pool.num_actors} to {pool.max_actors or pool.num_actors} of {pool.num_cpus:g} CPU, {pool.num_gpus:g} GPU"
    )
    rates = calibrate(x, uris=uris)
    told = outlook(rates, local_fleet(x), max(1, num))
    actors = max(1, pool.num_actors)
    text["bytes in"] = f"{told.bytes_read / 1e6:.0f} MB ({rates.sources['bytes_in']})"
    decoding = rates.decode_s * num / (actors * pool.num_threads)
    text["slicing"] = f"{decoding:.0f} s on {actors} actors ({rates.sources['decode_s']})"
    text["embedding"] = f"{num / (rates.clips_per_s * actors):.0f} s more ({rates.sources['clips_per_s']})"
    text["in all"] = f"{told.seconds:.0f} s; most of it goes into: {told.limits.bottleneck}"
    text["bytes out"] = f"{told.bytes_written / 1e6:.0f} MB in {STAGE_FOLDERS['embed']}/"
    return text


def _checked(x: Experiment) -> Any:
    listing = storage.resolve(str(x.data.panoramas))
    root = storage.resolve(x.data.image_root) if x.data.image_root else os.path.dirname(listing)
    return check_listing(read_listing(listing), image_root=root, layout=x.data.layout)


def num_panoramas(x: Experiment) -> int:
    """How many panoramas the experiment has: of its listing, or to be rendered."""
    if x.data.panoramas is not None:
        return max(1, int(_checked(x).panoramas.num_rows))
    return x.data.synthetic.num if x.data.synthetic else 1


def local_fleet(x: Experiment) -> Fleet:
    """The actors of the run itself, as a fleet: each a lane with its own decoding threads."""
    pool = x.embed
    cores = min(pool.num_threads, os.cpu_count() or 1)
    return Fleet(
        num_gpus=pool.num_actors, gpus_per_node=1, cores_per_gpu=cores, startup_s=10.0, block_rows=pool.rows_per_block
    )


def calibrate(
    x: Experiment,
    *,
    uris: Sequence[str] | None = None,
    gpu: str | None = None,
    clips_per_s: float | None = None,
    overlapped: bool = False,
) -> Rates:
    """What one panorama of this experiment costs, from a few of them.

    Args:
        x: the experiment.
        uris: addresses of its images; None reads the listing. Where there is none yet, a few panoramas are rendered.
        gpu: a GPU that `hedwig.planning.GPUS` knows: its rate is estimated from the work of a clip. None or "cpu"
            measures the encoder on this device.
        clips_per_s: a rate that was measured elsewhere.
        overlapped: see `hedwig.planning.Rates`.

    Raises:
        ValueError: no figures for this GPU, or the work of a clip cannot be counted.
    """
    if uris is None and x.data.panoramas is not None and storage.exists(storage.resolve(x.data.panoramas)):
        uris = _checked(x).panoramas["image_uri"].to_pylist()
    sizes, seconds, read_s, which = _probe(x, list(uris or ()))
    spec = sizes_of(x.encoder)
    vectors = 1 + (x.slicing.num_frames if keeps_frames(x.encoder.fusion) else 0)
    rate, rate_source = _clips_per_s(x, gpu, clips_per_s)
    return Rates(
        bytes_in=float(np.mean(sizes)),
        bytes_out=4.0 * (vectors * spec.image_dim + spec.text_dim) + OTHER_COLUMNS_BYTES,
        decode_s=float(np.median(seconds)),
        clips_per_s=rate,
        overlapped=overlapped,
        sources={
            "bytes_in": f"mean of {which}",
            "decode_s": f"median CPU time of one core over {which}; reading them took {read_s * 1e3:.0f} ms each",
            "clips_per_s": rate_source,
            "overhead_s": "Ray's own CPU per panorama, the goal of `hedwig bench pipeline`",
            "bytes_out": f"vectors as stored, and {OTHER_COLUMNS_BYTES} bytes for the other columns",
        },
    )


def _probe(x: Experiment, uris: list[str]) -> tuple[list[int], list[float], float, str]:
    """Sizes of a few images, CPU seconds to decode and slice each, seconds to read one, and what they were."""
    from hedwig.panorama import decode_image, slice_panorama

    images, read_s = [], []
    for uri in uris[:: max(1, len(uris) // NUM_PROBES)][:NUM_PROBES]:
        try:
            began = time.perf_counter()
            images.append(read_image(uri))
            read_s.append(time.perf_counter() - began)
        except (OSError, ValueError):
            continue
    which = f"{len(images)} listed images"
    if not images:
        width = x.data.synthetic.width if x.data.synthetic else 2048
        images, which = _rendered(width), f"{NUM_RENDERED} rendered panoramas of {width} px"
    slicing = slicing_of(Run(x), x.encoder)
    sizes, seconds = [], []
    for data in [images[0], *images]:  # the first one once more: it pays for what is set up on first use
        began = time.process_time()
        try:
            slice_panorama(decode_image(data), slicing, projection="equirectangular", heading=math.nan)
        except (OSError, ValueError):
            continue
        sizes.append(len(data))
        seconds.append(time.process_time() - began)
    if not seconds:
        raise ValueError(f"None of {which} could be decoded and sliced; look at them with `hedwig slice`.")
    return sizes[1:] or sizes, seconds[1:] or seconds, float(np.mean(read_s)) if read_s else 0.0, which


def _rendered(width: int) -> list[bytes]:
    from hedwig.benchmark.preprocessing import synthetic_panoramas

    return synthetic_panoramas(NUM_RENDERED, width=width, as_rendered=True)


def _clips_per_s(x: Experiment, gpu: str | None, stated: float | None) -> tuple[float, str]:
    """The encoder's rate on one device, and where it comes from."""
    if stated is not None:
        return stated, "stated: --clips-per-s"
    if gpu is not None and gpu != "cpu":
        flop = _flop_per_clip(x)
        share = "estimated: 0.6 of what a good matrix product reaches (0.8 of the peak)"
        return clips_per_s_of(gpu, flop), f"{share} on {gpu}, {flop / 1e9:,.0f} GFLOP a clip; not measured"
    encoder = _load(x, "cpu" if gpu == "cpu" else x.encoder.device)
    shape = (x.embed.batch_size if encoder.device.type == "cuda" else 1, x.slicing.num_frames)
    frames = np.zeros((*shape, encoder.frame_px, encoder.frame_px, 3), dtype=np.uint8)
    encoder.encode_frames(frames)
    took: list[float] = []
    while len(took) < 2 or (sum(took) < 1.0 and len(took) < 8):
        began = time.perf_counter()
        encoder.encode_frames(frames)
        took.append(time.perf_counter() - began)
    where = "this GPU" if encoder.device.type == "cuda" else "this machine's CPU"
    return shape[0] / min(took), f"measured on {where}, best of {len(took)} batches of {shape[0]}"


def _load(x: Experiment, device: str) -> Any:
    from hedwig.models.encoder import load_encoder
    from hedwig.models.spec import ENCODER_NAMES

    weights = None if x.encoder.name in ENCODER_NAMES else weights_of(x.encoder)
    return load_encoder(
        x.encoder.name,
        weights=weights,
        quick_gelu=None if weights is None else x.encoder.quick_gelu,
        seed=x.encoder.seed,
        dtype=x.encoder.dtype,
        device=device,
        fusion=x.encoder.fusion,
        temporal=x.encoder.temporal,
    )


def _flop_per_clip(x: Experiment) -> float:
    """Work of one panorama's frames; a ViCLIP is counted without its weights."""
    from hedwig.benchmark.embed import flop_per_clip
    from hedwig.models.shapes import shapes_only
    from hedwig.models.spec import CONFIGS
    from hedwig.models.viclip import ViCLIP

    spec = sizes_of(x.encoder)
    if x.encoder.name.startswith("viclip-"):
        with shapes_only():
            module: Any = ViCLIP(CONFIGS[x.encoder.name])
        num_frames = spec.num_frames if x.encoder.temporal == "select" else x.slicing.num_frames
    else:
        module, num_frames = _load(x, "cpu").module, x.slicing.num_frames
    flop = flop_per_clip(module, num_frames, spec.frame_px)
    if flop is None:
        raise ValueError(f"The work of a clip of {x.encoder.name} cannot be counted; state its rate: --clips-per-s.")
    return float(flop)


def compare(x: Experiment, rates: Rates | None = None) -> dict[str, Any] | None:
    """The plan for the run's own actors beside what its manifest says; None where there is no embedding table.

    Args:
        x: the experiment.
        rates: calibrated on this device with the experiment's own settings; None does that here.

    Returns:
        ``rows, seconds, simulated_s, rows_per_s, bytes_in, bytes_out, decode_s, embed_s``, each {planned, real, ratio};
        what the run did not measure is left out. Real is this run's own part of the table: rows that were taken over,
        or done before a kill, took none of its time.
    """
    run = Run(x)
    manifest = storage.read_manifest(run.folder("embed"))
    if manifest is None or manifest.num_out == 0:
        return None
    measured: dict[str, Any] = manifest.details.get("measured", {})
    if "measured" not in manifest.details and manifest.details.get("reused"):
        return None  # all rows were taken over: there is nothing to compare
    rates = rates or calibrate(x)
    rows = int(measured.get("rows", manifest.num_out)) or manifest.num_out
    told: Outlook = outlook(rates, local_fleet(x), rows)
    files = [f for f in storage.list_files(run.folder("embed"), suffix=".parquet") if "part-" in os.path.basename(f)]
    stored = sum(_size(f) for f in files)
    wall: dict[str, float] = measured.get("wall_s", {})
    cpu: dict[str, float] = measured.get("cpu_s", {})
    embedding = sum(spent for stage, spent in wall.items() if stage.endswith("Embedder"))
    planned_real: dict[str, tuple[float, float | None]] = {
        "seconds": (told.seconds, measured.get("seconds", manifest.seconds)),
        "bytes_out": (rates.bytes_out, stored / manifest.num_out),
        "bytes_in": (rates.bytes_in, measured["bytes_in"] / rows if measured.get("bytes_in") else None),
        "decode_s": (rates.decode_s, cpu["PanoramaSlicer"] / rows if cpu.get("PanoramaSlicer") else None),
        "embed_s": (1 / rates.clips_per_s, embedding / rows if embedding else None),
    }
    lines: dict[str, Any] = {
        name: {"planned": planned, "real": real, "ratio": real / planned if planned else None}
        for name, (planned, real) in planned_real.items()
        if real is not None
    }
    real_s = lines["seconds"]["real"]
    simulated_s = simulate(node_fleet(rates, local_fleet(x)), rows).seconds
    lines["simulated_s"] = {"planned": simulated_s, "real": real_s, "ratio": real_s / simulated_s}
    planned_rate, real_rate = rows / told.seconds, rows / real_s if real_s else math.nan
    lines["rows_per_s"] = {"planned": planned_rate, "real": real_rate, "ratio": real_rate / planned_rate}
    return {"rows": rows, **lines}


def _size(path: str) -> int:
    fs, inner = storage.filesystem(path)
    return int(fs.get_file_info(inner).size)
