"""What is published is what is served: a swap without a failed request, and an old release that stays when it must."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from starlette.testclient import TestClient
from test_serving_app import JPEG_TYPE, jpeg
from tests_serving import FakeLocator

from hedwig import publishing, storage
from hedwig.publishing import pointer_token
from hedwig.serving import create_app
from hedwig.serving.releases import Follower
from hedwig.serving.replica import open_release

ONE = np.zeros((1, 4), dtype="<f4").tobytes()


def version_folder(run, name, num=1):
    """A version as a service sees it: an index and geocells, with manifests that differ between versions."""
    folder = run if name == "." else run / name
    for artefact in ("index", "geocells"):
        (folder / artefact).mkdir(parents=True)
        storage.publish(str(folder / artefact), kind=artefact, config={"of": name}, inputs={}, num_in=num, num_out=num)
    return str(folder)


def load(folder):
    locator = FakeLocator()
    locator.names = (folder,)
    return locator


def publish(run, name):
    publishing.publish(str(run), lambda folder: None, name)


def served(run, loader=load, **options):
    """A client, its service and its follower, as a replica has them, without the thread."""
    release = open_release(str(run), loader)
    app = create_app(release.locator, info=release.info, cells=release.cells)
    token = pointer_token(str(run))
    follower = Follower(
        lambda: pointer_token(str(run)), lambda: open_release(str(run), loader), served=token, **options
    )
    return TestClient(app, base_url="http://127.0.0.1:8000"), app.state.service, follower


def asked(client):
    """The folder that answered, and the digest that the answer names."""
    response = client.post("/v1/neighbours", content=ONE, headers={"Content-Type": "application/octet-stream"})
    assert response.status_code == 200
    answer = response.json()
    return answer["neighbour_ids"][0][0], answer["run_digest"]


@pytest.fixture
def run(tmp_path):
    for name, num in ((".", 1), ("versions/0002", 2), ("versions/0003", 3)):
        version_folder(tmp_path, name, num)
    return tmp_path


def digest_of(folder):
    return storage.manifest_digest(f"{folder}/index")


def test_a_publication_and_a_rollback_are_served_without_a_start(run):
    client, service, follower = served(run)
    assert asked(client) == (str(run), digest_of(run))
    assert not follower.look(service)
    publish(run, "versions/0002")
    assert asked(client)[0] == str(run)  # nobody has looked yet
    assert follower.look(service)
    second = str(run / "versions/0002")
    assert asked(client) == (second, digest_of(second))
    info = client.get("/v1/info").json()
    assert (info["num_references"], info["run_digest"]) == (2, digest_of(second))
    assert info["publication"]["state"] == "current"
    assert info["publication"]["published"].startswith("versions/0002@")
    assert service.release.cells == f"{second}/geocells"
    located = client.post("/v1/locate", content=jpeg(), headers=JPEG_TYPE).json()
    assert located["run_digest"] == digest_of(second)
    assert f'run_digest="{digest_of(second)}"' in client.get("/metrics").text
    publish(run, "versions/0003")
    assert follower.look(service)
    publishing.rollback(str(run))
    assert follower.look(service)
    assert asked(client) == (second, digest_of(second))
    assert not follower.look(service)


def test_what_cannot_be_loaded_leaves_what_was_served_and_is_tried_again(run, caplog):
    broken = {"versions/0002"}

    def loader(folder):
        if any(folder.endswith(name) for name in broken):
            raise ValueError("secret-path/index is damaged")
        return load(folder)

    client, service, follower = served(run, loader, retry_s=0.0)
    publish(run, "versions/0002")
    assert not follower.look(service)
    assert asked(client) == (str(run), digest_of(run))
    said = client.get("/v1/info").json()["publication"]
    assert (said["state"], said["reason"]) == ("failed", "ValueError; see the log")
    assert "is damaged" in caplog.text
    broken.clear()
    assert follower.look(service)
    assert asked(client)[0].endswith("versions/0002")


def test_what_failed_is_not_loaded_over_and_over(run):
    tries = []

    def loader(folder):
        tries.append(folder)
        if folder.endswith("0002"):
            raise OSError("storage is away")
        return load(folder)

    _, service, follower = served(run, loader)
    publish(run, "versions/0002")
    for _ in range(5):
        follower.look(service)
    assert len(tries) == 2
    publish(run, "versions/0003")  # something else is published: at once
    assert follower.look(service)
    assert service.publication["state"] == "current"


def test_a_changed_artefact_is_not_served(run):
    client, service, follower = served(run)
    publish(run, "versions/0002")
    storage.publish(str(run / "versions/0002/index"), kind="index", config={"of": "x"}, inputs={}, num_in=9, num_out=9)
    assert not follower.look(service)
    assert service.publication["state"] == "failed"
    assert asked(client)[0] == str(run)


def test_a_pointer_that_cannot_be_read_ends_nothing(run):
    client, service, follower = served(run)
    publish(run, "versions/0002")
    good = (run / publishing.POINTER).read_text()
    (run / publishing.POINTER).write_text("{")
    assert not follower.look(service)
    assert client.get("/v1/info").json()["publication"]["state"] == "unknown"
    assert asked(client)[0] == str(run)
    (run / publishing.POINTER).write_text(good)
    assert follower.look(service)
    assert service.publication["state"] == "current"


def test_a_request_under_way_ends_with_the_release_it_began_with(run):
    began, go_on = threading.Event(), threading.Event()

    class Slow(FakeLocator):
        def embed(self, queries):
            began.set()
            assert go_on.wait(30)
            return super().embed(queries)

    client, service, follower = served(run, lambda folder: Slow(name=folder))
    answers = []

    def locate():
        answers.append(client.post("/v1/locate", content=jpeg(), headers=JPEG_TYPE).json())

    thread = threading.Thread(target=locate)
    thread.start()
    assert began.wait(30)
    publish(run, "versions/0002")
    assert follower.look(service)
    go_on.set()
    thread.join()
    assert (answers[0]["run_digest"], answers[0]["pano_id"].rsplit("-", 1)[0]) == (digest_of(run), str(run))
    locate()
    second = str(run / "versions/0002")
    assert (answers[1]["run_digest"], answers[1]["pano_id"].rsplit("-", 1)[0]) == (digest_of(second), second)


def test_swaps_under_load_mix_nothing_and_fail_nothing(run):
    client, service, follower = served(run, period_s=0.01)
    digests = {str(f): digest_of(f) for f in (run, run / "versions/0002", run / "versions/0003")}
    end, seen, failed = threading.Event(), [], []

    def ask():
        while not end.is_set():
            try:
                seen.append(asked(client))
            except Exception as error:  # any failure at all counts
                failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    follower.follow(service)
    try:
        for number in range(8):
            publish(run, ("versions/0002", "versions/0003")[number % 2])
            deadline = time.monotonic() + 30
            name = ("0002", "0003")[number % 2]
            while not service.release.cells.endswith(f"{name}/geocells"):
                assert time.monotonic() < deadline
                time.sleep(0.005)
    finally:
        end.set()
        follower.stop()
        for thread in threads:
            thread.join()
    assert failed == []
    assert dict(seen) | digests == digests
    assert all(digests[folder] == digest for folder, digest in seen)
    assert len({folder for folder, _ in seen}) >= 2
