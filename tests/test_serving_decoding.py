"""Decoding in another process: the same bits, and whatever goes wrong there stays there."""

from __future__ import annotations

import io
import os
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image
from test_serving_limits import png

from hedwig.panorama import decode_image
from hedwig.serving.decoding import DecodePool


def encoded(kind, width=160, height=80, seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def pool():
    with_one = DecodePool(1, timeout_s=5.0)
    yield with_one
    with_one.close()


def pid_of(pool):
    (worker,) = pool._workers
    return worker._process.pid


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pixels_are_the_same_bits_as_without_a_process(pool, kind):
    turned = Image.Exif()
    turned[0x0112] = 6
    for data in (encoded(kind), encoded(kind, exif=turned.tobytes()), encoded(kind, width=2048, height=1024)):
        found = pool(data)
        assert (found.dtype, found.flags["C_CONTIGUOUS"], found.flags["WRITEABLE"]) == (np.uint8, True, True)
        assert np.array_equal(found, decode_image(data))


def test_half_size_is_passed_on(pool):
    data = encoded("JPEG", 320, 160)
    assert np.array_equal(pool(data, True), decode_image(data, half_size=True))
    assert np.array_equal(pool(data), decode_image(data))


def test_a_refusal_is_the_decoders_own_and_the_worker_goes_on(pool):
    before = pid_of(pool)
    for data in (encoded("JPEG")[:-40], b"no image", b"", png(10_000, 10_000)):
        with pytest.raises(ValueError, match=r"\w") as expected:
            decode_image(data)
        with pytest.raises(ValueError, match=r"\w") as seen:
            pool(data)
        assert str(seen.value) == str(expected.value)
    assert pid_of(pool) == before


def test_an_answer_never_holds_pixels_of_the_one_before(pool):
    large, small = encoded("JPEG", 800, 400, seed=1), encoded("PNG", 40, 24, seed=2)
    for data in (large, small, large):
        assert np.array_equal(pool(data), decode_image(data))


def test_a_worker_that_dies_while_decoding_is_replaced():
    pool = DecodePool(1)
    try:
        data = encoded("JPEG")
        pool(data)
        before = pid_of(pool)
        os.kill(before, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (before, signal.SIGKILL)).start()
        with pytest.raises(ValueError, match="ended the process"):
            pool(data)
        assert np.array_equal(pool(data), decode_image(data))
        assert (pid_of(pool) != before, pool.num_killed) == (True, 1)
        os.kill(pid_of(pool), signal.SIGKILL)  # one that dies between two images is nobody's fault
        time.sleep(0.2)
        assert np.array_equal(pool(data), decode_image(data))
    finally:
        pool.close()


def test_a_worker_that_hangs_is_killed_in_time():
    pool = DecodePool(1, timeout_s=0.5)
    try:
        data = encoded("JPEG")
        pool(data)
        before = pid_of(pool)
        os.kill(before, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(ValueError, match="too long"):
            pool(data)
        assert 0.4 < time.monotonic() - began < 3.0
        with pytest.raises(ProcessLookupError):
            os.kill(before, 0)
        assert np.array_equal(pool(data), decode_image(data))
    finally:
        pool.close()


def test_memory_is_limited_and_the_limit_is_a_refusal():
    pool = DecodePool(1, memory_bytes=64 * 1024**2)
    try:
        with pytest.raises(ValueError, match=r"[Mm]emory"):
            pool(png(6000, 5000))  # 90 MB once decoded
        data = encoded("JPEG")
        assert np.array_equal(pool(data), decode_image(data))
    finally:
        pool.close()


def test_the_worker_knows_no_secret(monkeypatch):
    monkeypatch.setenv("HEDWIG_API_KEYS", "canary-in-the-environment")
    pool = DecodePool(1)
    try:
        pool(encoded("JPEG"))
        with open(f"/proc/{pid_of(pool)}/environ", "rb") as file:
            assert b"canary" not in file.read()
    finally:
        pool.close()


def test_several_threads_share_the_workers():
    pool = DecodePool(2)
    try:
        images = [encoded("JPEG", seed=seed) for seed in range(12)]
        results = [None] * len(images)

        def work(first):
            for i in range(first, len(images), 4):
                results[i] = pool(images[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(np.array_equal(found, decode_image(data)) for found, data in zip(results, images, strict=True))
    finally:
        pool.close()


def test_closing_ends_the_processes_and_bad_options_are_refused():
    pool = DecodePool(2)
    pids = [worker._process.pid for worker in pool._workers]
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed"):
        pool(b"x")
    with pytest.raises(ValueError, match="num_workers=0"):
        DecodePool(0)
