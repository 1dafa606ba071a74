"""The networks: ViCLIP, image towers, the encoder that wraps any of them, and the geolocator head."""

from __future__ import annotations

__all__: list[str] = []
