"""Decoding: the same pixels as Pillow, one kind of error for everything that is not a whole image."""

from __future__ import annotations

import csv
import hashlib
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from hedwig.panorama import content_hash, decode_image, image_size


def picture(height=96, width=160, seed=0):
    """A smooth coloured gradient with noise: every kind of block a codec knows."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    base = np.stack([255 * columns / width, 255 * rows / height, 128 + 100 * np.sin(columns / 5)], axis=-1)
    return np.clip(base + rng.normal(0, 12, base.shape), 0, 255).astype(np.uint8)


def encode(pixels, kind="JPEG", mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"quality": 90}),
        ("JPEG", "RGB", {"quality": 75, "subsampling": 0}),
        ("JPEG", "RGB", {"quality": 85, "progressive": True}),
        ("JPEG", "RGB", {"quality": 85, "keep_rgb": True}),
        ("JPEG", "RGB", {"quality": 85, "restart_marker_rows": 1}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGB", {"quality": 80}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"quality": 80}),
    ],
)
@pytest.mark.parametrize("shape", [(96, 160), (37, 53), (1, 1)])
def test_same_pixels_as_pillow(kind, mode, options, shape):
    data = encode(picture(*shape), kind, mode, **options)
    pixels = decode_image(data)
    assert np.array_equal(pixels, pillow(data))
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert image_size(data) == (shape[1], shape[0])


def test_real_images_are_bit_identical_to_pillow(shared):
    files = sorted((shared / "data" / "mapillary_sample").glob("*.jpg"))[:6]
    files += sorted((shared / "data" / "polyhaven_panoramas").glob("*.jpg"))[:6]
    files += sorted((shared / "data" / "sign_photos").glob("*.jpg"))[:6]
    assert len(files) == 18
    for file in files:
        data = file.read_bytes()
        assert np.array_equal(decode_image(data), np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB")))


def test_listed_sizes_are_read_from_headers(shared):
    with open(shared / "data" / "real_images.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    for row in rows[::7]:
        data = (shared / "data" / row["image_uri"]).read_bytes()
        assert image_size(data[:65536]) == (int(row["width"]), int(row["height"]))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    pixels = decode_image(buffer.getvalue())
    assert np.array_equal(pixels, np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_palette_with_alpha_does_not_warn():
    data = encode(picture(), "PNG", "P", transparency=bytes([0, 128, 255]))
    assert decode_image(data).shape == (96, 160, 3)


def test_first_image_of_an_animation():
    frames = [Image.fromarray(picture(seed=seed)) for seed in (1, 2)]
    for kind in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], lossless=True)
        assert np.array_equal(decode_image(buffer.getvalue()), picture(seed=1))


def exif_payload(orientation, gps=None):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    if orientation is not None:
        exif[0x0112] = orientation
    if gps is not None:
        exif.get_ifd(0x8825).update({1: "N", 2: gps[:3], 3: "E", 4: gps[3:]})
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied(kind, orientation):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(picture(40, 64), kind, exif=exif_payload(orientation), **options)
    reference = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    pixels = decode_image(data)
    assert np.array_equal(pixels, reference)
    assert pixels.flags.c_contiguous
    assert image_size(data) == (64, 40)


def test_position_in_exif_never_changes_a_pixel():
    plain = decode_image(encode(picture()))
    for gps in ((48.0, 46.0, 12.0, 9.0, 10.0, 30.0), (1.0, 17.0, 0.0, 103.0, 50.0, 0.0)):
        data = encode(picture(), exif=exif_payload(None, gps))
        assert b"Exif\0\0" in data
        assert np.array_equal(decode_image(data), plain)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"garbage!",
        b"MM\0*\0\0\0\xff",
        b"MM\0*\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff\x12\x01\x03",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0",  # orientation 99
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0\x06\0",  # orientation as text
    ],
)
def test_broken_exif_leaves_the_picture_upright(payload):
    body = b"Exif\0\0" + payload
    plain = encode(picture())
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
    assert np.array_equal(decode_image(data), decode_image(plain))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (None, "must be bytes, got NoneType"),
        ("text", "must be bytes, got str"),
        (b"<html>not here</html>", "Not a JPEG, PNG or WebP"),
        (b"GIF89a" + bytes(100), "Not a JPEG, PNG or WebP"),
        (b"\xff\xd8\xff", "cut short"),
        (b"\xff\xd8\xff\xe0\x00", "cut short"),
        (b"\xff\xd8\xff\xe0\x00\x04ab????", "damaged"),
        (b"\xff\xd8\xff\xda\x00\x02", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "no header chunk"),
        (b"RIFF\0\0\0\0WEBPVP8X", "no image header"),
    ],
)
def test_what_is_no_image_says_so(data, words):
    with pytest.raises(ValueError, match=words):
        decode_image(data)
    with pytest.raises(ValueError, match=words):
        image_size(data)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("WEBP", "RGB", {"quality": 80}),
        ("WEBP", "RGB", {"lossless": True}),
    ],
)
def test_truncation_is_an_error_and_never_a_half_picture(kind, mode, options):
    data = encode(picture(64, 96), kind, mode, **options)
    whole = decode_image(data)
    accepted = 0
    for length in [*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 24, len(data))]:
        try:
            pixels = decode_image(data[:length])
        except ValueError:
            continue
        accepted += 1
        assert np.array_equal(pixels, whole), f"{length} of {len(data)} bytes gave other pixels"
    # Pillow forgives a PNG its checksums and last chunk (all pixels are there) and a CMYK JPEG its last marker.
    assert accepted == 0 or (kind == "PNG" and accepted <= 24) or (mode == "CMYK" and accepted <= 4)


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_with_a_forged_end_is_still_an_error(progressive):
    data = encode(picture(), progressive=progressive)
    for part in (0.4, 0.6, 0.9):
        with pytest.raises(ValueError, match="damaged or was cut short"):
            decode_image(data[: int(part * len(data))] + b"\xff\xd9")


def test_bytes_after_the_end_are_ignored():
    data = encode(picture())
    assert np.array_equal(decode_image(data + b"trailing" * 50), decode_image(data))


def png_bomb(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_pixel_limits_come_from_the_header_and_name_the_number():
    with pytest.raises(ValueError, match=r"13000x13000 = 169,000,000 pixels, more than the 40,000,000 allowed"):
        decode_image(png_bomb(13000, 13000))
    forged = bytearray(encode(picture()))
    at = forged.index(b"\xff\xc0")
    forged[at + 5 : at + 9] = struct.pack(">HH", 65000, 65000)
    with pytest.raises(ValueError, match=r"65000x65000 = 4,225,000,000 pixels"):
        decode_image(bytes(forged))
    webp = bytearray(encode(picture(), "WEBP", exif=exif_payload(1)))
    webp[24:30] = b"\xff\x3f\x00\xff\x3f\x00"
    with pytest.raises(ValueError, match=r"16384x16384 = 268,435,456 pixels"):
        decode_image(bytes(webp))
    data = encode(picture())
    with pytest.raises(ValueError, match=r"160x96 = 15,360 pixels, more than the 15,359"):
        decode_image(data, max_jpeg_pixels=15359)
    assert decode_image(data, max_jpeg_pixels=15360).shape == (96, 160, 3)


def test_a_large_jpeg_is_decoded_smaller_and_its_cmyk_twin_refused():
    assert decode_image(encode(picture(101, 203)), max_pixels=20_000).shape == (51, 102, 3)
    assert decode_image(encode(picture(101, 203)), max_pixels=4_000).shape == (26, 51, 3)
    with pytest.raises(ValueError, match="cannot be decoded at a reduced size"):
        decode_image(encode(picture(101, 203), mode="CMYK"), max_pixels=20_000)


def test_half_size_approximates_the_mean_of_two_by_two():
    smooth = np.asarray(Image.fromarray(picture()).resize((24, 14)).resize((160, 96), Image.Resampling.BICUBIC))
    data = encode(smooth, quality=95)
    half = decode_image(data, half_size=True)
    mean = decode_image(data).reshape(48, 2, 80, 2, 3).mean(axis=(1, 3))
    assert half.shape == (48, 80, 3)
    assert np.abs(half - mean).mean() < 1.0
    assert decode_image(encode(smooth, "PNG"), half_size=True).shape == (96, 160, 3)


def test_a_progressive_jpeg_of_too_many_scans_is_refused():
    data = encode(picture(), progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    with pytest.raises(ValueError, match=r"scans, more than the 100 allowed"):
        decode_image(data[:-2] + scan * 100 + b"\xff\xd9")


def test_damaged_files_raise_value_error_and_nothing_else():
    rng = random.Random(7)
    sources = [
        encode(picture(48, 64)),
        encode(picture(48, 64), progressive=True, exif=exif_payload(6)),
        encode(picture(48, 64), mode="CMYK"),
        encode(picture(48, 64), "PNG", "P"),
        encode(picture(48, 64), "WEBP", exif=exif_payload(3)),
        encode(picture(48, 64), "WEBP", lossless=True),
    ]
    outcomes = {"decoded": 0, "refused": 0}
    for _ in range(1500):
        data = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(min(len(data), 700))] = rng.randrange(256)
        try:
            pixels = decode_image(bytes(data), max_pixels=1_000_000, max_jpeg_pixels=1_000_000)
        except ValueError:
            outcomes["refused"] += 1
        else:
            assert pixels.dtype == np.uint8
            assert pixels.shape[2] == 3
            outcomes["decoded"] += 1
    assert min(outcomes.values()) > 100


def test_content_hash_is_the_start_of_sha256():
    assert content_hash(b"abc") == "ba7816bf8f01cfea414140de5dae2223"
    parts = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in (b"a", b"b"))).hexdigest()
    assert content_hash([b"a", b"b"]) == parts[:32]
    assert content_hash([b"b", b"a"]) != content_hash([b"a", b"b"]) != content_hash(b"ab")
