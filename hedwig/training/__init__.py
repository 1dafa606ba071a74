"""Training on Ray Train: the head on cached embeddings, and the encoder on frames, from scratch or fine-tuned."""

from __future__ import annotations

from hedwig.training.encoder import train_encoder
from hedwig.training.finetune import finetune_encoder
from hedwig.training.frames import frames_schema, read_frames, write_frames
from hedwig.training.head import train_geolocator

__all__ = [
    "finetune_encoder",
    "frames_schema",
    "read_frames",
    "train_encoder",
    "train_geolocator",
    "write_frames",
]
