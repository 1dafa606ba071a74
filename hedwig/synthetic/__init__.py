"""A procedural Earth: panoramas at real places whose clues (sun, soil, plants, houses, signs) follow geography.

`World` lists where, `render_panorama` draws what one sees there, `PanoramaRenderer` does it for batches. It serves
tests and demonstrations without any download; it is not a benchmark of the real world.
"""

from __future__ import annotations

from hedwig.synthetic.render import PanoramaRenderer, encode_jpeg, render_panorama
from hedwig.synthetic.world import World

__all__ = ["PanoramaRenderer", "World", "encode_jpeg", "render_panorama"]
