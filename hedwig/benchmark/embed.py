"""What an encoder reaches on this machine: clips a second, and that as a share of the machine's matrix product.

Clips are synthetic uint8 frames, copied to the device anew each time, through `encode_frames` as in the pipeline. The
work of a clip is counted by `torch.utils.flop_counter` on the meta device (2 FLOP per multiplication and addition), as
this implementation does it; ``full_flop_per_clip`` is the published architecture's, whose last block also computes the
tokens that nobody reads. The ceiling is the best of the square matrix products of the same dtype that were measured
between the batches, so both meet the same load and clock. It is not a data sheet's number.
"""

from __future__ import annotations

import copy
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hedwig.models.encoder import load_encoder
from hedwig.models.viclip import ViCLIP

__all__ = ["EmbeddingFigures", "flop_per_caption", "flop_per_clip", "measure_embedding"]

CPU_SIDE, CUDA_SIDE = 2048, 8192  # of the square matrices: beyond it neither gets faster
NUM_PRODUCTS = 3  # per round
LEAST_BATCHES = 2


@dataclass(frozen=True)
class EmbeddingFigures:
    """The figures of one encoder on one device; FLOP are None where they could not be counted."""

    model: str
    weights_note: str
    device: str
    device_name: str
    dtype: str
    compiled: bool
    num_threads: int
    batch_size: int
    num_batches: int
    clips_per_s: float
    best_clips_per_s: float
    flop_per_clip: int | None
    full_flop_per_clip: int | None
    flop_per_caption: int | None
    achieved_flop_per_s: float | None
    ceiling_flop_per_s: float
    ratio_to_ceiling: float | None
    peak_memory_bytes: int
    warm_up_s: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For readers."""
        compiled = ", compiled" if self.compiled else ""
        threads = "" if self.device == "cuda" else f", {self.num_threads} threads"
        memory = "on the device" if self.device == "cuda" else "of the process"
        lines = [
            f"{self.model}, {self.weights_note}, {self.dtype}{compiled} on {self.device_name}{threads}",
            f"  {self.clips_per_s:.4g} clips/s (median of {self.num_batches} batches of {self.batch_size}; best "
            f"{self.best_clips_per_s:.4g}; warm-up {self.warm_up_s:.1f} s)",
            f"  ceiling {self.ceiling_flop_per_s / 1e12:.4g} TFLOP/s, the best square matrix product in {self.dtype}",
            f"  peak memory {self.peak_memory_bytes / 2**30:.2f} GiB {memory}",
        ]
        if self.flop_per_clip and self.achieved_flop_per_s and self.ratio_to_ceiling:
            full = f" (the published form: {self.full_flop_per_clip / 1e9:,.1f})" if self.full_flop_per_clip else ""
            lines.insert(
                2,
                f"  {self.flop_per_clip / 1e9:,.1f} GFLOP per clip{full}: {self.achieved_flop_per_s / 1e12:.4g} "
                f"TFLOP/s, {self.ratio_to_ceiling:.1%} of the ceiling",
            )
        return "\n".join(lines)


def flop_per_clip(module: nn.Module, num_frames: int, frame_px: int, *, full: bool = False) -> int | None:
    """Work of one clip of (num_frames, frame_px, frame_px, 3) uint8 frames, or None if it cannot be counted.

    Args:
        module: anything with `video_features_uint8`; its weights are neither read nor changed.
        num_frames: V.
        frame_px: S.
        full: let ViCLIP's last block compute every token, as the published code does.
    """
    twin: Any = _on_meta(module)
    if full and isinstance(twin, ViCLIP):
        transformer: Any = twin.vision_encoder.transformer
        original = transformer.forward
        transformer.forward = lambda x, **_: original(x)
    frames = torch.zeros((1, num_frames, frame_px, frame_px, 3), dtype=torch.uint8, device="meta")
    return _counted(lambda: twin.video_features_uint8(frames))


def flop_per_caption(module: nn.Module) -> int | None:
    """Work of one caption, which is padded to the context and so as much for any, or None if it cannot be counted."""
    twin: Any = _on_meta(module)
    context_length = getattr(getattr(module, "config", module), "context_length", None)
    if context_length is None:
        return None
    ids = torch.zeros((1, context_length), dtype=torch.int64, device="meta")
    return _counted(lambda: twin.text_features(ids))


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of `module` without memory."""
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {
        id(t): nn.Parameter(t.to("meta"), requires_grad=False) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in tensors
    }
    return copy.deepcopy(module, memo)


def _counted(step: Callable[[], object]) -> int | None:
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            step()
    except (NotImplementedError, RuntimeError, AttributeError, TypeError, ValueError):
        return None  # some architectures look at values, which the meta device has not
    return int(counter.get_total_flops()) or None


def measure_embedding(
    name: str,
    *,
    weights: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    batch_size: int | None = None,
    seconds: float = 10.0,
    compiled: bool = False,
) -> EmbeddingFigures:
    """Embed synthetic clips for `seconds`, at least two batches after the warm-up.

    Args:
        name: as for `load_encoder`.
        weights: a path; None for random weights, which are as fast.
        dtype: float32, bfloat16 or float16.
        device: auto, cpu or cuda.
        batch_size: clips at once; None for 32 on CUDA and 1 elsewhere.
        seconds: how long to measure.
        compiled: use `torch.compile`; the first batch pays for it, in the warm-up.
    """
    encoder = load_encoder(name, weights=weights, device=device, dtype=dtype, compile=compiled)
    where, torch_dtype = encoder.device, getattr(torch, dtype)
    cuda = where.type == "cuda"
    num = batch_size or (32 if cuda else 1)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (num, encoder.num_frames, encoder.frame_px, encoder.frame_px, 3), dtype=np.uint8)
    side = CUDA_SIDE if cuda else CPU_SIDE
    left, right = (torch.randn(side, side, device=where).to(torch_dtype) for _ in range(2))
    if cuda:
        torch.cuda.reset_peak_memory_stats(where)
    began = time.perf_counter()
    encoder.encode_frames(frames)
    torch.matmul(left, right)
    warm_up_s = time.perf_counter() - began
    clip_s: list[float] = []
    product_s: list[float] = []
    began = time.perf_counter()
    while len(clip_s) < LEAST_BATCHES or time.perf_counter() - began < seconds:
        products = [_seconds(lambda: torch.matmul(left, right), where) for _ in range(NUM_PRODUCTS)]
        product_s += products
        share = time.perf_counter() + sum(products)  # a small model gets as much of the time as the products
        while True:
            clip_s.append(_seconds(lambda: encoder.encode_frames(frames), where) / num)
            if time.perf_counter() >= share:
                break
    module, shape = encoder.module, (encoder.num_frames, encoder.frame_px)
    work = flop_per_clip(module, *shape)
    full = flop_per_clip(module, *shape, full=True) if isinstance(module, ViCLIP) else None
    caption = flop_per_caption(module) if encoder.has_text else None
    achieved, ceiling = work / statistics.median(clip_s) if work else None, 2 * side**3 / min(product_s)
    return EmbeddingFigures(
        model=name,
        weights_note=encoder.weights_note,
        device=where.type,
        device_name=torch.cuda.get_device_name(where) if cuda else "the CPU",
        dtype=dtype,
        compiled=compiled,
        num_threads=torch.get_num_threads(),
        batch_size=num,
        num_batches=len(clip_s),
        clips_per_s=1 / statistics.median(clip_s),
        best_clips_per_s=1 / min(clip_s),
        flop_per_clip=work,
        full_flop_per_clip=full,
        flop_per_caption=caption,
        achieved_flop_per_s=achieved,
        ceiling_flop_per_s=ceiling,
        ratio_to_ceiling=achieved / ceiling if achieved else None,
        peak_memory_bytes=_peak_memory(where),
        warm_up_s=warm_up_s,
    )


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one step until the device is done with it."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    events: Any = torch.cuda.Event
    start, end = events(enable_timing=True), events(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1000


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
