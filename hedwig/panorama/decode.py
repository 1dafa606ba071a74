"""Image bytes to RGB pixels: exact, bounded before anything is allocated, and with one kind of error.

JPEG goes through simplejpeg (libjpeg-turbo), which yields the same pixels as Pillow in about 60 % of its time; its
`fastdct` and `fastupsample` change pixels by up to 63 levels and are never used. PNG, WebP and the JPEG flavours
that simplejpeg refuses (CMYK, unusual subsampling) go through Pillow, restricted to these three formats. The size is
read from the header by hand, because both libraries allocate before they let one look. Every failure is a
ValueError: damaged uploads are user input. This is not a sandbox: a service adds a timeout and a memory limit.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["content_hash", "decode_image", "image_size"]

_ORIENTATION_TAG = 0x0112
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn without DHT, JPG and DAC
_PROGRESSIVE_MARKERS = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_MAX_SCANS = 100  # encoders write about 10; each further one costs the reader a pass over all coefficients
# Levels 1..8 of the Exif orientation as (transpose, flip rows, flip columns), applied in this order.
_ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class _Header(NamedTuple):
    """What is known before decoding; width and height in px as stored, before any orientation."""

    kind: str
    width: int
    height: int
    progressive: bool = False
    exif: bytes = b""


def decode_image(
    data: bytes,
    *,
    half_size: bool = False,
    max_pixels: int = 40_000_000,
    max_jpeg_pixels: int = 140_000_000,
) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG or WebP into RGB.

    The Exif orientation is applied; everything else of Exif, XMP and colour profiles is dropped, and so is alpha.
    Of an animation the first image is taken.

    Args:
        data: The whole file.
        half_size: Decode a JPEG at half its width and height inside the DCT (1.3x to 1.8x faster, but not the
            pixels that a good resize gives: 42 dB). PNG and WebP are not affected.
        max_pixels: Limit for PNG and WebP, and for what a JPEG may occupy once decoded.
        max_jpeg_pixels: Limit for JPEG. One above `max_pixels` is decoded at 1/2, 1/4 or 1/8.

    Returns:
        (H, W, 3) uint8, C-contiguous and writable.

    Raises:
        ValueError: not an image, another format, truncated or damaged, or too many pixels.
    """
    data = _as_bytes(data)
    header = _read_header(data)
    limit = max_jpeg_pixels if header.kind == "JPEG" else max_pixels
    if header.width * header.height > limit:
        raise ValueError(
            f"The {header.kind} has {header.width}x{header.height} = {header.width * header.height:,} pixels, more "
            f"than the {limit:,} allowed; shrink it or raise the limit."
        )
    if header.kind == "JPEG":
        pixels = _decode_jpeg(data, header, half_size, max_pixels)
        exif = header.exif
    else:
        pixels, exif = _decode_with_pillow(data, header)
    turn = _ORIENTATIONS.get(_orientation(exif))
    if turn is not None:
        transpose, flip_rows, flip_columns = turn
        pixels = pixels.transpose(1, 0, 2) if transpose else pixels
        pixels = pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    return np.ascontiguousarray(pixels)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in px of a JPEG, PNG or WebP from its header alone, as stored, before any orientation.

    Raises:
        ValueError: not an image, another format, or cut short inside the header.
    """
    header = _read_header(_as_bytes(data))
    return header.width, header.height


def content_hash(data: bytes | Sequence[bytes]) -> str:
    """First 32 hexadecimal digits of the SHA-256 of a file; of several files, of their digests one after another."""
    if isinstance(data, bytes | bytearray | memoryview):
        return hashlib.sha256(data).hexdigest()[:32]
    return hashlib.sha256(b"".join(hashlib.sha256(item).digest() for item in data)).hexdigest()[:32]


def _as_bytes(data: object) -> bytes:
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ValueError(f"Image data must be bytes, got {type(data).__name__}; read the file first.")
    if len(data) == 0:
        raise ValueError("The image is empty (0 bytes); the download or upload did not deliver it.")
    return bytes(data)


def _read_header(data: bytes) -> _Header:
    if data[:3] == b"\xff\xd8\xff":
        header = _jpeg_header(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        header = _png_header(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        header = _webp_header(data)
    else:
        raise ValueError(f"Not a JPEG, PNG or WebP image: the {len(data):,} bytes begin with {data[:12]!r}.")
    if header.width == 0 or header.height == 0:
        raise ValueError(f"The {header.kind} declares {header.width}x{header.height} pixels; it is damaged.")
    return header


def _jpeg_header(data: bytes) -> _Header:
    """Walk the marker segments (ITU-T T.81, B.1) up to the frame header; Exif comes before it."""
    exif, at, size = b"", 2, len(data)
    while at + 4 <= size:
        if data[at] != 0xFF:
            raise ValueError(f"The JPEG is damaged: no marker at byte {at:,}, where a segment should begin.")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _FRAME_MARKERS:
            if at + 9 > size:
                break
            height, width = struct.unpack_from(">HH", data, at + 5)
            return _Header("JPEG", width, height, marker in _PROGRESSIVE_MARKERS, exif)
        if marker in (0xD9, 0xDA) or length < 2:
            raise ValueError(f"The JPEG is damaged: marker 0xFF{marker:02X} at byte {at:,} before any frame header.")
        if marker == 0xE1 and not exif and data[at + 4 : at + 10] == b"Exif\0\0":
            exif = data[at + 4 : at + 2 + length]
        at += 2 + length
    raise ValueError(f"The JPEG ends inside its header, after {size:,} bytes: it was cut short.")


def _png_header(data: bytes) -> _Header:
    if len(data) < 24 or data[12:16] != b"IHDR":
        raise ValueError(f"The PNG has no header chunk in its {len(data):,} bytes: it was cut short or is damaged.")
    width, height = struct.unpack_from(">II", data, 16)
    return _Header("PNG", width, height)


def _webp_header(data: bytes) -> _Header:
    """The three kinds of first chunk of a WebP container (RFC 9649, sections 2.5 to 2.7 and 3.4)."""
    chunk = data[12:16]
    if len(data) >= 30 and chunk == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif len(data) >= 30 and chunk == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    elif len(data) >= 25 and chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        raise ValueError(f"The WebP has no image header in its {len(data):,} bytes: it was cut short or is damaged.")
    return _Header("WebP", width, height)


def _decode_jpeg(data: bytes, header: _Header, half_size: bool, max_pixels: int) -> NDArray[np.uint8]:
    import simplejpeg

    if header.progressive and (scans := data.count(b"\xff\xda")) > _MAX_SCANS:
        raise ValueError(f"The JPEG has {scans} scans, more than the {_MAX_SCANS} allowed; store it again as baseline.")
    factor = 2 if half_size else 1
    while factor < 8 and -(-header.width // factor) * -(-header.height // factor) > max_pixels:
        factor *= 2
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):
        return _decode_with_pillow(data, header, max_pixels)[0]  # subsampling it does not know: 4:1:0 or 4:4:1
    if (width, height) != (header.width, header.height):
        raise ValueError(f"The JPEG is damaged: its headers say {header.width}x{header.height} and {width}x{height}.")
    if colours not in ("Gray", "YCbCr", "RGB"):
        return _decode_with_pillow(data, header, max_pixels)[0]
    smallest = {} if factor == 1 else {"min_width": -(-width // factor), "min_height": -(-height // factor)}
    try:
        # strict: a warning of libjpeg means that pixels are missing, and it would hand over grey ones.
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, strict=True, **smallest)
    except (ValueError, KeyError, MemoryError) as error:
        raise ValueError(f"The JPEG is damaged or was cut short ({_reason(error)}).") from error
    return pixels


def _decode_with_pillow(data: bytes, header: _Header, max_pixels: int | None = None) -> tuple[NDArray[np.uint8], bytes]:
    """RGB (H, W, 3) and the Exif payload; `max_pixels` when the caller has not yet enforced it for this path."""
    from PIL import Image

    if max_pixels is not None and header.width * header.height > max_pixels:
        raise ValueError(
            f"The {header.kind} has {header.width}x{header.height} pixels in a flavour that cannot be decoded at a "
            f"reduced size, more than the {max_pixels:,} allowed; store it as ordinary YCbCr 4:2:0."
        )
    failures = (
        OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError,
        struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
    )  # fmt: skip
    if header.exif:  # already read; Pillow would parse all of it for a resolution, and warn
        data = data.replace(header.exif, bytes(len(header.exif)), 1)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.size != (header.width, header.height):
                raise ValueError(f"headers say {header.width}x{header.height} and {image.size}")
            image.load()
            exif = image.info.get("exif", b"")
            if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it at 255
                grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2), exif
            # A palette with alpha warns when it is converted in one step.
            opaque = image.convert("RGBA") if "transparency" in image.info else image
            return np.array(opaque.convert("RGB")), exif
    except failures as error:
        raise ValueError(f"The {header.kind} is damaged or was cut short ({_reason(error)}).") from error


def _orientation(exif: bytes) -> int:
    """The orientation 1..8 of an Exif payload, with or without its "Exif" prefix; 1 when absent or unreadable.

    Read by hand from the first directory (TIFF 6.0, section 2): Pillow warns on damaged Exif and reads all of it.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(num_entries):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, directory + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG:
                return int(value) if kind == 3 else 1
    except struct.error:  # cut short: viewers show such a picture upright, and so do we
        pass
    return 1


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ") if str(error) else type(error).__name__
