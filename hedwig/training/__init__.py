"""Training on Ray Train: the geolocator head on cached embeddings, and a tiny encoder from scratch on frames."""

from __future__ import annotations

from hedwig.training.encoder import train_encoder
from hedwig.training.frames import frames_schema, read_frames, write_frames
from hedwig.training.head import train_geolocator

__all__ = ["frames_schema", "read_frames", "train_encoder", "train_geolocator", "write_frames"]
