"""Replicas come while the service is busy and go when it is not, and nobody is refused or loses an answer by it.

Slow (two minutes): .venv/bin/pytest -s -m slow tests/test_serving_autoscaling.py
"""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest
import ray
from test_serving_releases import version_folder
from tests_serving import free_port

from hedwig.serving import Client, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def slow_loader():
    """A loader whose locator takes a third of a second for a search, and asks others for it, so a thread waits."""

    def load(run):
        import time

        from tests_serving import FakeLocator

        class Slow(FakeLocator):
            searches_here = False

            def neighbours(self, embedded, top_k=5, *, cells=None):
                time.sleep(0.3)
                return super().neighbours(embedded, top_k, cells=cells)

        return Slow()

    return load


@pytest.fixture
def url(ray_session, tmp_path):
    version_folder(tmp_path, ".", 1)
    yield start(
        str(tmp_path), port=free_port(), load=slow_loader(), num_replicas=1, max_replicas=2, num_cpus=0.5,
        max_ongoing_requests=4, upscale_delay_s=1.0, downscale_delay_s=5.0, ready_timeout_s=120.0, rate_per_s=0,
    )  # fmt: skip
    stop()


def num_replicas():
    prefix = "SERVE_REPLICA::hedwig#locate#"
    return sum(actor["name"].startswith(prefix) for actor in ray.util.list_named_actors(all_namespaces=True))


def test_a_busy_service_grows_and_an_idle_one_shrinks(url):
    answers, failures, end, seen = [], [], threading.Event(), []

    def ask():
        with Client(url, num_retries=0) as client:
            while not end.is_set():
                try:
                    answers.append(client.neighbours(np.zeros((1, 4), dtype="<f4")))
                except Exception as error:
                    failures.append(error)

    def until(num):
        began = time.monotonic()
        while not seen or seen[-1][1] != num:
            assert time.monotonic() < began + 180, (num, seen, failures[:3])
            time.sleep(0.5)
            if not seen or num_replicas() != seen[-1][1]:
                seen.append((round(time.monotonic() - began, 1), num_replicas()))

    until(1)
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        until(2)
        time.sleep(5)
    finally:
        end.set()
        for thread in threads:
            thread.join()
    busy = len(answers)
    until(1)
    sys.__stdout__.write(f"\nreplicas: {seen}; {busy} answers, {len(failures)} failures\n")
    assert failures == []
    assert busy > 20
