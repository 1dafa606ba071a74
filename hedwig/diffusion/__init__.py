"""Panoramas by diffusion: from a caption, or a view and a caption, to a seamless equirectangular image.

Needs the extra `synthesis`; nothing here is loaded by the rest of hedwig. What it makes is marked as made and may be
trained on, never scored: see `hedwig.sources.synthesised`.
"""

from __future__ import annotations

from hedwig.diffusion.checkpoint import Checkpoint, check_checkpoint
from hedwig.diffusion.circular import SeamMetric, seam_step
from hedwig.diffusion.panoramas import PanoramaGenerator
from hedwig.diffusion.prompts import PromptTemplate

__all__ = ["Checkpoint", "PanoramaGenerator", "PromptTemplate", "SeamMetric", "check_checkpoint", "seam_step"]
