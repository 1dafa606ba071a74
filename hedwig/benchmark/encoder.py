"""The encoder in bfloat16 against float32: the ratio of their times and the agreement of their answers.

What one encoder reaches on a machine is asked in `hedwig.benchmark.embed`.
"""

from __future__ import annotations

import numpy as np

from hedwig.benchmark.timing import interleaved

__all__ = ["encoder_benchmark"]


def encoder_benchmark(name: str = "viclip-tiny", *, batch_size: int = 16, num_rounds: int = 5) -> dict[str, float]:
    """Forward passes of one encoder: bfloat16 against float32 weights, and the cosine between their answers."""
    from hedwig.models.encoder import load_encoder

    exact, half = (load_encoder(name, seed=0, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    shape = (batch_size, exact.num_frames, exact.frame_px, exact.frame_px, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    each = interleaved(
        {"float32": lambda: exact.encode_frames(frames), "bfloat16": lambda: half.encode_frames(frames)}, num_rounds
    )
    cosine = (exact.encode_frames(frames) * half.encode_frames(frames)).sum(axis=1)
    return {
        "bfloat16_vs_float32": each["float32"] / each["bfloat16"],
        "min_cosine": float(cosine.min()),
        "float32_panoramas_per_cpu_s": batch_size / each["float32"],
    }
