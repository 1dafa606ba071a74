"""Captions: a short text per panorama, written from its frames and never from its position.

`TemplateCaptioner` measures pixels and needs no model; `openai`, `batch`, `local` and `vllm` ask one, and are imported
from their modules where they are used. A caption has at most 30 tokens by default, because ViCLIP's text tower reads 32
with start and end.
"""

from __future__ import annotations

from hedwig.captions.kept import KeptCaptioner
from hedwig.captions.template import TemplateCaptioner, captioner_options

__all__ = ["KeptCaptioner", "TemplateCaptioner", "captioner_options"]
