"""The process that decodes what strangers sent: it may crash, hang or eat its memory, and nothing else is harmed.

Run by `hedwig.serving.decoding` as ``python -m hedwig.serving.decode_worker REQUEST PIXELS LIMIT TIMEOUT`` with two
memory files, and with nothing of the service in it: no model, no key, an empty environment. It answers on stdout with
fixed records and never with pickles. The decoder is `hedwig.panorama.decode_image`, the one that everything else
uses, so the pixels are the same bits. It limits its own address space once its libraries are loaded; a hung decoder
ends by the alarm even if the parent has died.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ANSWER", "READY", "REQUEST", "main"]

REQUEST = struct.Struct("<QQQB")  # bytes of the image, max_pixels, max_jpeg_pixels, half_size
ANSWER = struct.Struct("<BIII")  # 0 pixels or 1 refusal; height and width in px; bytes of the text that follows
READY = b"R"
_MOST_TEXT = 2000


def main(request_file: int, pixels_file: int, memory_bytes: int, timeout_s: int) -> None:
    """Decode until stdin ends.

    Args:
        request_file: Descriptor of a memory file with the encoded image.
        pixels_file: Descriptor of a memory file for the (H, W, 3) uint8 pixels.
        memory_bytes: Address space on top of what is mapped when it starts.
        timeout_s: The process ends when one image takes longer.
    """
    import PIL.JpegImagePlugin
    import PIL.PngImagePlugin
    import PIL.WebPImagePlugin  # noqa: F401 - loaded now, because Pillow would do it under the memory limit
    import simplejpeg  # noqa: F401

    from hedwig.panorama.decode import decode_image

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, mapped + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    os.write(1, READY)
    while True:
        header = _read(0, REQUEST.size)
        if header is None:
            return
        num_bytes, max_pixels, max_jpeg_pixels, half_size = REQUEST.unpack(header)
        signal.alarm(timeout_s)
        pixels: NDArray[np.uint8] | None
        try:
            pixels = decode_image(
                os.pread(request_file, num_bytes, 0),
                half_size=bool(half_size),
                max_pixels=max_pixels,
                max_jpeg_pixels=max_jpeg_pixels,
            )
            _write_at_start(pixels_file, pixels.data.cast("B"))
            answer, text = (0, pixels.shape[0], pixels.shape[1]), b""
        except (ValueError, MemoryError) as error:
            reason = str(error) or "It needs more memory to decode than this service grants."
            answer, text = (1, 0, 0), reason.encode()[:_MOST_TEXT]
        pixels = None  # before the next image, which may be as large
        signal.alarm(0)
        os.write(1, ANSWER.pack(*answer, len(text)) + text)


def _read(source: int, num: int) -> bytes | None:
    data = b""
    while len(data) < num:
        chunk = os.read(source, num - len(data))
        if not chunk:
            return None
        data += chunk
    return data


def _write_at_start(file: int, data: memoryview) -> None:
    at = 0
    while at < len(data):
        at += os.pwrite(file, data[at:], at)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
