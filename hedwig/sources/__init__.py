"""Where panoramas come from: listings on disk and in object storage, checked row by row."""

from hedwig.sources.images import ImageReader, read_image
from hedwig.sources.listing import read_listing
from hedwig.sources.splits import random_split, spatial_split
from hedwig.sources.table import CheckedListing, check_listing

__all__ = [
    "CheckedListing",
    "ImageReader",
    "check_listing",
    "random_split",
    "read_image",
    "read_listing",
    "spatial_split",
]
