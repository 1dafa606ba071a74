"""The networks: ViCLIP, mean-pooled CLIP, the encoder that wraps either of them, and the geolocator head."""

from __future__ import annotations

__all__: list[str] = []
