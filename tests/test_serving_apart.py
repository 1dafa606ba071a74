"""Encoder and shards as deployments of a real Ray Serve: the library's answers, through a kill and a hot swap."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from test_retrieve_run import NUM_CELLS, NUM_REFERENCES, finished_run, picture, png, publish  # noqa: F401 - fixture
from tests_serving import free_port

from hedwig import publishing, storage
from hedwig.geocells import Geocells
from hedwig.index import GeocellIndex
from hedwig.retrieve import Hedwig
from hedwig.serving import Client, start, stop

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run of real geocells and two versions, whose references have other names."""
    root = tmp_path_factory.mktemp("apart") / "run"
    for folder, letter in ((root, "r"), (root / "versions" / "0002", "s")):
        shutil.copytree(finished_run, folder, dirs_exist_ok=True)
        cells = np.arange(NUM_REFERENCES) % NUM_CELLS
        lat, lon = 10.0 * cells + 0.01 * np.arange(NUM_REFERENCES), -20.0 * cells
        shutil.rmtree(folder / "geocells")
        Geocells.from_membership(lat, lon, cells).save(folder / "geocells")
        publish(folder / "geocells", "geocells", {}, ("embeddings",))
        publish(folder / "geolocator", "geolocator", {}, ("embeddings", "geocells"))
        manifest = storage.read_manifest(str(folder / "index"))
        old = GeocellIndex.open(folder / "index")
        names = [letter + name[1:] for name in old.pano_ids]
        index = GeocellIndex.build(old.vectors(), old.cell_ids, names, old.lat, old.lon, codec="fp32")
        index.save(folder / "index")
        publish(folder / "index", "index", manifest.config, ("embeddings", "geocells", "geolocator"))
    return root


@pytest.fixture
def url(ray_session: None, run: Path):
    yield start(
        str(run),
        port=free_port(),
        encoder="apart",
        encoder_num_cpus=0.5,
        encoder_num_gpus=0,
        encoder_batch=4,
        shards=2,
        shard_num_cpus=0.5,
        num_cpus=0.5,
        decode="thread",
        look_every_s=0.5,
        request_timeout_s=240.0,
        ready_timeout_s=400.0,
    )
    stop()


def kill(deployment: str) -> int:
    """End the processes of a deployment as a crash does; how many there were."""
    prefix = f"SERVE_REPLICA::hedwig#{deployment}#"
    found = [a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith(prefix)]
    for actor in found:
        ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
    return len(found)


def test_the_answers_are_the_librarys_through_kills_and_a_swap(url: str, run: Path) -> None:
    images = [png(picture(i)) for i in range(4)]
    expected = [Hedwig.load(str(run)).locate(image, top_k=3) for image in images]
    digests = {letter: storage.manifest_digest(str(run / folder / "index")) for letter, folder in
               (("r", "."), ("s", "versions/0002"))}  # fmt: skip
    answers, failures, end = [], [], threading.Event()

    def ask() -> None:
        with Client(url, num_retries=0, timeout_s=300.0) as client:
            while not end.is_set():
                try:
                    for image, truth in zip(images, expected, strict=True):
                        answers.append((client.locate(image, top_k=3), truth))
                except Exception as error:
                    failures.append(error)
                    time.sleep(0.5)

    def more(num: int) -> None:
        goal, deadline = len(answers) + num, time.monotonic() + 400
        while len(answers) < goal and time.monotonic() < deadline and not failures:
            time.sleep(0.1)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        more(12)
        for deployment in ("shard-0", "encoder"):
            assert kill(deployment) == 1
            more(12)
        publishing.publish(str(run), lambda folder: None, "versions/0002")
        deadline = time.monotonic() + 300
        while answers[-1][0].run_digest != digests["s"] and time.monotonic() < deadline:
            more(1)
        more(12)
    finally:
        end.set()
        for thread in threads:
            thread.join()
    with Client(url) as client:
        assert client.info().layout == {"encoder": "apart", "shards": 2}
    assert failures == []
    assert answers[-1][0].run_digest == digests["s"]
    for answer, truth in answers:
        letter = answer.neighbour_ids[0][0]
        assert {name[0] for name in answer.neighbour_ids} == {letter}
        assert answer.run_digest == digests[letter]  # never a mixed one
        assert [name[1:] for name in answer.neighbour_ids] == [name[1:] for name in truth.neighbour_ids]
        assert answer.cell_ids == list(truth.cell_ids)
        assert answer.neighbour_scores == pytest.approx(list(truth.neighbour_scores), abs=1e-5)  # batches round
