"""Captions: a short text per panorama, written from its frames and never from its position.

`TemplateCaptioner` measures pixels and needs no model. A caption has at most 30 tokens, because ViCLIP's text tower
reads 32 with start and end.
"""

from __future__ import annotations

from hedwig.captions.template import TemplateCaptioner, captioner_options

__all__ = ["TemplateCaptioner", "captioner_options"]
