"""What a request may cost: bytes, pixels, seconds and places."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
import zlib

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from hedwig.serving.limits import REFUSALS, Gate, Limits, check_image, check_type, read_body, refusal


def request_of(chunks, headers=(), pause_s=0.0):
    messages = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive():
        await asyncio.sleep(pause_s)
        return messages.pop(0)

    scope = {"type": "http", "method": "POST", "headers": [(k.encode(), v.encode()) for k, v in headers]}
    request = Request(scope, receive)
    request.left = messages
    return request


def refused(code):
    return pytest.raises(HTTPException, check=lambda e: e.detail["code"] == code and e.status_code == REFUSALS[code][0])


def png(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    pixels = zlib.compress(bytes(height * (width + 1)), 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_body_is_joined_and_its_largest_size_is_still_accepted():
    assert asyncio.run(read_body(request_of([b"ab", b"cd"]), 4, 1.0)) == b"abcd"


def test_one_byte_more_is_refused_and_little_of_the_rest_is_read():
    request = request_of([b"abc", b"de"] + [b"x" * 6] * 5)
    with refused("body_too_large"):
        asyncio.run(read_body(request, 4, 1.0))
    assert len(request.left) == 8 - 4  # 3 + 2 + 6 + 6 bytes are more than four times the limit


def test_declared_length_is_believed_before_anything_is_kept():
    far_too_large = request_of([b"abc"], [("content-length", "17")])
    with refused("body_too_large"):
        asyncio.run(read_body(far_too_large, 4, 1.0))
    assert len(far_too_large.left) == 2
    too_large = request_of([b"abc"], [("content-length", "5")])
    with refused("body_too_large"):  # although only three bytes arrive
        asyncio.run(read_body(too_large, 4, 1.0))
    assert too_large.left == []


def test_too_large_and_slow_is_too_large():
    request = request_of([b"abcde"] * 3, pause_s=0.05)
    with refused("body_too_large"):
        asyncio.run(read_body(request, 4, 0.08))


@pytest.mark.parametrize("length", ["-1", "1e3", "²", "0x10"])
def test_a_length_that_is_no_number_is_refused(length):
    request = request_of([b"abc"])
    request.headers  # noqa: B018 - cached, so that a value latin-1 lacks can be put in
    request._headers = {"content-length": length}
    with refused("body_incomplete"):
        asyncio.run(read_body(request, 4, 1.0))


def test_empty_and_slow_bodies():
    with refused("empty_body"):
        asyncio.run(read_body(request_of([]), 4, 1.0))
    began = time.monotonic()
    with refused("body_timeout"):  # each chunk is in time; the whole is not
        asyncio.run(read_body(request_of([b"x"] * 50, pause_s=0.03), 100, 0.1))
    assert time.monotonic() - began < 1.0


def test_media_types():
    for good in ("image/jpeg", "IMAGE/PNG; q=1", "application/octet-stream"):
        check_type(good)
    for bad in (None, "", "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
        with refused("unsupported_type"):
            check_type(bad)


def test_image_size_is_read_without_decoding_and_bounded_by_kind():
    limits = Limits(max_pixels=50, max_jpeg_pixels=10_000)
    assert check_image(png(10, 5), limits) == (10, 5)
    with refused("too_many_pixels"):
        check_image(png(17, 3), limits)
    frame = b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 50, 200) + bytes(10)
    assert check_image(b"\xff\xd8" + frame, limits) == (200, 50)  # a JPEG of 10,000 pixels is within its own limit
    with refused("bad_image"):
        check_image(png(10, 5)[:12], limits)
    for text in (b"hello", b"\xff\xd8", b"RIFF1234WAVE"):
        with refused("not_an_image"):
            check_image(text, limits)


def test_every_refusal_has_a_status_and_a_next_move():
    assert all(400 <= status < 600 and advice.endswith(".") for status, advice in REFUSALS.values())
    assert refusal("overloaded", "x").status_code == 503


def test_limits_refuse_nonsense():
    with pytest.raises(ValueError, match="num_threads is 0"):
        Limits(num_threads=0)


def test_gate_never_works_on_more_than_its_threads_and_refuses_what_it_cannot_hold():
    gate = Gate(Limits(max_ongoing_requests=3, max_queued_requests=2, num_threads=2))
    running, most, lock = 0, 0, threading.Lock()

    def work():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return 1

    async def one():
        async with gate.place():
            return await gate.run(work)

    async def many():
        return await asyncio.gather(*(one() for _ in range(9)), return_exceptions=True)

    answers = asyncio.run(many())
    assert answers.count(1) == 5
    assert [e.detail["code"] for e in answers if e != 1] == ["overloaded"] * 4
    assert all(e.headers["Retry-After"] == "1" for e in answers if e != 1)
    assert most == 2


def test_work_that_hangs_keeps_its_thread_but_not_its_caller():
    gate = Gate(Limits(request_timeout_s=0.1, num_threads=1))
    release = threading.Event()

    async def scenario():
        with refused("too_slow"):
            await gate.run(lambda: release.wait(10))
        with refused("too_slow"):  # the thread is still taken
            await gate.run(lambda: True)
        assert gate.oldest_s() >= 0.15
        release.set()
        assert await gate.run(lambda: "again") == "again"
        await asyncio.sleep(0.05)
        assert gate.oldest_s() == 0.0

    asyncio.run(scenario())


def test_what_lies_ready_for_a_thread_is_not_begun_once_its_caller_has_gone():
    gate = Gate(Limits(request_timeout_s=0.2, num_threads=1))
    release, begun = threading.Event(), []

    async def scenario():
        first = asyncio.ensure_future(gate.run(lambda: release.wait(10)))
        await asyncio.sleep(0.1)
        second = asyncio.ensure_future(gate.run(lambda: begun.append("second")))
        for one in (first, second):
            with refused("too_slow"):
                await one
        release.set()
        assert await gate.run(lambda: "third") == "third"
        assert begun == []

    asyncio.run(scenario())


def test_places_come_back_after_an_error():
    gate = Gate(Limits(max_ongoing_requests=1, max_queued_requests=0))

    async def scenario():
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                async with gate.place():
                    await gate.run(lambda: 1 // 0)
        async with gate.place():
            assert await gate.run(lambda: 7) == 7

    asyncio.run(scenario())
