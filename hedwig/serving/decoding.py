"""Decoding in processes that can be killed: a bounded pool of `hedwig.serving.decode_worker`.

Images are decoded by C libraries from bytes that strangers chose. Each worker has a limit on its address space and a
few seconds per image; one that hangs, crashes or runs out is killed and replaced, and the request gets a refusal like
any other damaged image. Bytes and pixels travel in memory files (memfd) that parent and child both hold, copied once
each way; the parent reads into an array of its own and maps nothing, because a child that shrinks a mapped file kills
whoever reads it. Workers are started by exec, not forked: the service has threads and a model in memory. This bounds
what a decoder can cost, and keeps keys and weights out of its process; it is not a system-call filter.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time

import numpy as np
from numpy.typing import NDArray

from hedwig.serving.decode_worker import ANSWER, READY, REQUEST

__all__ = ["DecodePool"]

# All that a worker needs to find Python and its packages, and no secret.
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "VIRTUAL_ENV")
_START_TIMEOUT_S = 60.0
_KEEP_BYTES = 64 * 1024**2  # a memory file above it is given back after use
_ALARM_SLACK_S = 2.0


class DecodePool:
    """Workers that decode one image each at a time; calls beyond that wait.

    Args:
        num_workers: Processes.
        max_pixels: For PNG and WebP, and for what a JPEG may occupy once decoded.
        max_jpeg_pixels: For JPEG.
        timeout_s: For one image; then its worker is killed.
        memory_bytes: Address space of a worker on top of what its libraries map. 40 megapixels of PNG take about
            0.6 GiB, a progressive 4:4:4 JPEG of 140 megapixels 0.9 GiB.
    """

    def __init__(
        self,
        num_workers: int = 1,
        *,
        max_pixels: int = 40_000_000,
        max_jpeg_pixels: int = 140_000_000,
        timeout_s: float = 5.0,
        memory_bytes: int = 3 * 1024**3 // 2,
    ) -> None:
        if num_workers < 1 or not timeout_s > 0 or memory_bytes < 1:
            raise ValueError(
                f"num_workers={num_workers}, timeout_s={timeout_s:g} and memory_bytes={memory_bytes} must be above 0."
            )
        self._limits = (max_pixels, max_jpeg_pixels)
        self._most_bytes = 3 * max(max_pixels, 1)
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._workers: set[_Worker] = set()
        self.num_killed = 0
        for _ in range(num_workers):
            self._start()

    def __call__(self, data: bytes, half_size: bool = False) -> NDArray[np.uint8]:
        """The pixels (H, W, 3), uint8, exactly as `decode_image` gives them. Blocks: call it in a thread.

        Args:
            data: The whole file.
            half_size: See `decode_image`; what the run's slicing says.

        Raises:
            ValueError: about the image: damaged, too large, too slow to decode, or it ended the decoder.
            RuntimeError: no worker can be started, or the pool is closed.
        """
        if self._closed:
            raise RuntimeError("The pool of decoders is closed.")
        while (worker := self._idle.get()).ended():  # between two images, which is not this one's fault
            self._replace(worker)
        good = False
        try:
            pixels = worker.decode(data, (*self._limits, int(half_size)), self._timeout_s, self._most_bytes)
            good = True
            return pixels
        except _Refused as error:
            good = True
            raise ValueError(str(error)) from None
        finally:
            if good:
                self._idle.put(worker)
            else:
                self._replace(worker)

    def close(self) -> None:
        """End the workers."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, set()
        for worker in workers:
            worker.kill()

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                return
            worker = _Worker(self._memory_bytes, self._timeout_s)
            self._workers.add(worker)
        self._idle.put(worker)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        with self._lock:
            self._workers.discard(worker)
            self.num_killed += 1
        self._start()


class _Refused(ValueError):
    """The worker refused the image, and is fine."""


class _Worker:
    """One process and its two memory files."""

    def __init__(self, memory_bytes: int, timeout_s: float) -> None:
        self._files = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("hedwig-image", "hedwig-pixels")]
        arguments = (*self._files, memory_bytes, math.ceil(timeout_s + _ALARM_SLACK_S))
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this Python, this package, four numbers
                [sys.executable, "-P", "-m", "hedwig.serving.decode_worker", *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # libraries quote the image
                bufsize=0,
                pass_fds=self._files,
                env=kept | one_thread,
                start_new_session=True,  # Ctrl-C is for the service, which ends its workers itself
            )
        except OSError as error:
            self._close_files()
            raise RuntimeError(f"A decoder could not be started ({error}).") from None
        self._ready = False

    def decode(self, data: bytes, limits: tuple[int, int, int], timeout_s: float, most_bytes: int) -> NDArray[np.uint8]:
        if not self._ready:
            if self._receive(len(READY), time.monotonic() + _START_TIMEOUT_S, "start") != READY:
                raise RuntimeError("A decoder did not start; run `python -m hedwig.serving.decode_worker` to see why.")
            self._ready = True
        image, pixels = self._files
        sent = memoryview(data)
        at = 0
        while at < len(sent):
            at += os.pwrite(image, sent[at:], at)
        deadline = time.monotonic() + timeout_s
        stdin = self._process.stdin
        try:
            os.write(stdin.fileno() if stdin else -1, REQUEST.pack(len(data), *limits))
        except OSError:
            raise ValueError("The image ended the process that decoded it; it is damaged.") from None
        failed, height, width, num_text = ANSWER.unpack(self._receive(ANSWER.size, deadline, "decode"))
        if failed:
            # Its word is not trusted further than its length is.
            text = self._receive(min(num_text, 4096), deadline, "decode") if num_text else b""
            self._give_back()
            raise _Refused(text.decode("utf-8", "replace"))
        size = 3 * height * width
        if not 0 < size <= most_bytes or os.fstat(pixels).st_size < size:
            raise ValueError(f"The decoder returned {width}x{height} pixels, which it may not; the image is damaged.")
        found = np.empty((height, width, 3), dtype=np.uint8)
        view = found.data.cast("B")
        at = 0
        while at < size:
            num = os.preadv(pixels, [view[at:]], at)
            if num == 0:
                raise ValueError("The decoder cut its pixels short; the image is damaged.")
            at += num
        self._give_back()
        return found

    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """End the process and take its files back."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._close_files()

    def _receive(self, num: int, deadline: float, doing: str) -> bytes:
        pipe = self._process.stdout
        source = pipe.fileno() if pipe else -1
        poll = select.poll()
        poll.register(source, select.POLLIN)
        data = b""
        while len(data) < num:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poll.poll(1000 * left_s):
                if doing == "start":
                    raise RuntimeError(f"A decoder did not start within {_START_TIMEOUT_S:g} s.")
                raise ValueError("The image took too long to decode; store it again as a baseline JPEG.")
            chunk = os.read(source, num - len(data))
            if not chunk:
                if doing == "start":
                    raise RuntimeError("A decoder ended before it was ready; is the package installed completely?")
                raise ValueError("The image ended the process that decoded it; it is damaged.")
            data += chunk
        return data

    def _give_back(self) -> None:
        for file in self._files:
            if os.fstat(file).st_size > _KEEP_BYTES:
                os.ftruncate(file, 0)

    def _close_files(self) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):
                os.close(file)
