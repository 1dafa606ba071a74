"""Encoder and index elsewhere, in memory: the same answers, of one version each, and patience with who dies."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError
from starlette.testclient import TestClient
from test_retrieve_run import _geocells, finished_run, picture, png, publish  # noqa: F401 - fixtures

from hedwig import storage
from hedwig.index import GeocellIndex
from hedwig.retrieve import Hedwig
from hedwig.serving import create_app
from hedwig.serving.calls import Calls
from hedwig.serving.encoder_pool import Cut, EncoderReplica, RemoteEmbedder, encode_together
from hedwig.serving.layout import Layout, index_bytes
from hedwig.serving.shards import ShardReplica, index_opener
from hedwig.serving.versions import NotHere, Version, Versions, content_digest


class Handle:
    """A deployment's handle over processes that are objects here and die when they are told to."""

    def __init__(self, *replicas: Any) -> None:
        self.alive = list(replicas)
        self.num_asked = 0

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            self.num_asked += 1
            if not self.alive:
                raise ActorDiedError
            replica = random.choice(self.alive)
            if replica is None:
                self.alive.remove(None)  # found dead by whoever asked it
                raise ActorDiedError
            return await getattr(replica, name)(*arguments)

        return SimpleNamespace(remote=call)

    def broadcast(self, name: str, *arguments: Any) -> Any:
        async def results(timeout_s: float) -> list[Any]:
            return await asyncio.gather(*[getattr(r, name)(*arguments) for r in self.alive if r is not None])

        return SimpleNamespace(results_async=results)


class Unbatched:
    """An `EncoderReplica` without Serve, whose batches it needs."""

    def __init__(self, replica: EncoderReplica) -> None:
        self.prepare, self.each_frame, self._versions = replica.prepare, replica.each_frame, replica._versions

    async def encode(self, cut: Cut) -> Any:
        (found,) = encode_together(self._versions, [cut])
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def calls() -> Iterator[Calls]:
    made = Calls(10.0)
    yield made
    made.close()


def shard_handles(run: Path | str, num_shards: int) -> list[Handle]:
    return [Handle(ShardReplica(str(run), shard, num_shards)) for shard in range(num_shards)]


def elsewhere(folder: Path | str, calls: Calls, shards: list[Handle], encoder: Handle | None = None) -> Hedwig:
    def remote(run: str, manifest: storage.Manifest) -> RemoteEmbedder:
        return RemoteEmbedder(calls, encoder, run, manifest, most=2)

    return Hedwig.load(
        str(folder),
        open_index=index_opener(calls, shards, str(folder)) if shards else None,
        encoder=None if encoder is None else remote,
    )


def test_apart_and_in_shards_the_answers_are_the_same(finished_run: Path, calls: Calls) -> None:  # noqa: F811
    run = str(finished_run)
    whole = Hedwig.load(run)
    encoder = Handle(Unbatched(EncoderReplica(run, "cpu", 2, 0.0)))
    apart = elsewhere(run, calls, shard_handles(run, 3), encoder)
    assert (whole.searches_here, apart.searches_here) == (True, False)
    assert apart.embedder.encoder.model_id == whole.embedder.encoder.model_id
    assert apart.slicing == whole.slicing
    for i in range(3):
        expected = whole.locate(picture(i), top_k=4, heading=20.0)
        assert apart.locate(picture(i), top_k=4, heading=20.0) == expected
    queries = [whole.query(picture(i)) for i in range(5)]
    together, there = whole.embed(queries[:2]), apart.embed(queries)
    assert set(there) == set(together)
    np.testing.assert_array_equal(there["image_embedding"][:2], together["image_embedding"])  # in twos, as it was cut
    assert len(there["image_embedding"]) == 5
    predictions = whole.answer(queries[:2], together)
    assert apart.explain(queries[:2], together, predictions) == whole.explain(queries[:2], together, predictions)
    assert apart.neighbours(together, 4) == whole.neighbours(together, 4)


def test_a_prior_in_the_score_changes_nothing_in_that(finished_run: Path, calls: Calls) -> None:  # noqa: F811
    whole = Hedwig.load(str(finished_run))
    apart = elsewhere(finished_run, calls, shard_handles(finished_run, 2))
    embedded = whole.embed([whole.query(picture(i)) for i in range(6)])
    for weight in (0.0, 0.3):
        answers = [
            Hedwig(h.retriever.rescored(0.5, weight), slicing=h.slicing, embedder=h.embedder).neighbours(embedded, 5)
            for h in (whole, apart)
        ]
        assert answers[0] == answers[1]


@pytest.fixture
def two_versions(tmp_path: Path) -> tuple[str, str]:
    """Two indices of the same places whose references have other names."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((60, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for name in ("one", "two"):
        order = rng.permutation(60)
        names = [f"{name}-{i:02d}" for i in range(60)]
        index = GeocellIndex.build(vectors[order], order % 6, names, np.zeros(60), np.zeros(60), codec="fp32")
        index.save(tmp_path / name / "index")
        publish(tmp_path / name / "index", "index", {})
    return str(tmp_path / "one"), str(tmp_path / "two")


def opened(folder: str, calls: Calls, shards: list[Handle]) -> tuple[Any, GeocellIndex]:
    manifest = storage.read_manifest(f"{folder}/index")
    assert manifest is not None
    path = Path(folder) / "index"
    sharded = index_opener(calls, shards, folder)(path, manifest.files)
    return sharded, GeocellIndex.open(path, manifest.files)


def test_while_a_version_takes_over_each_request_has_its_own(two_versions: tuple[str, str], calls: Calls) -> None:
    one, two = two_versions
    shards = shard_handles(one, 3)
    late = [ShardReplica(one, shard, 3) for shard in range(3)]
    queries, cells = np.eye(8, dtype=np.float32), np.tile(np.arange(6), (8, 1))
    old, old_whole = opened(one, calls, shards)
    new, new_whole = opened(two, calls, shards)
    for handle, replica in zip(shards, late, strict=True):
        handle.alive.append(replica)  # it started when the new version was not yet there, and nobody told it
    expected = [whole.search(queries, cells, 4)[0].tolist() for whole in (old_whole, new_whole)]
    assert expected[0] != expected[1]
    for _ in range(40):  # whom of two it asks is chance
        assert [index.search(queries, cells, 4)[0].tolist() for index in (old, new)] == expected
    assert [len(replica._versions.digests) for replica in late] == [2, 2, 2]
    shutil.rmtree(one)  # what is mapped stays
    assert old.search(queries, cells, 4)[0].tolist() == expected[0]


def test_a_folder_that_holds_something_else_by_now_is_not_asked(two_versions: tuple[str, str]) -> None:
    one, two = two_versions
    replica = ShardReplica(one, 0, 2)
    manifest = storage.read_manifest(f"{one}/index")
    assert manifest is not None
    with pytest.raises(NotHere, match="another index"):
        asyncio.run(replica.prepare(Version(two, content_digest(manifest.files)[::-1])))
    with pytest.raises(NotHere, match="another index"):
        asyncio.run(replica.prepare(Version(f"{two}/nowhere", "0")))


def test_a_killed_process_of_a_shard_costs_a_repetition_and_no_answer(
    two_versions: tuple[str, str], calls: Calls
) -> None:
    shards = shard_handles(two_versions[0], 2)
    index, whole = opened(two_versions[0], calls, shards)
    queries, cells = np.eye(8, dtype=np.float32), np.tile(np.arange(6), (8, 1))
    expected = whole.search(queries, cells, 4)[0].tolist()
    for _ in range(3):
        shards[0].alive.insert(0, None)
        before = shards[0].num_asked
        while None in shards[0].alive:
            assert index.search(queries, cells, 4)[0].tolist() == expected
        assert shards[0].num_asked > before + 1


def test_without_a_shard_the_answer_is_503_with_retry_after(finished_run: Path) -> None:  # noqa: F811
    calls = Calls(0.3)
    shards = shard_handles(finished_run, 2)
    client = TestClient(create_app(elsewhere(finished_run, calls, shards)), base_url="http://localhost")
    data, image = png(picture(3)), {"Content-Type": "image/png"}
    answer = client.post("/v1/locate", content=data, headers=image)
    assert (answer.status_code, answer.json()["neighbour_ids"][0]) == (200, "r03")
    saved = [handle.alive for handle in shards]
    for handle in shards:
        handle.alive = []
    for route in ("/v1/locate", "/v1/neighbours"):
        refused = client.post(route, content=data, headers=image)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "not_ready"
    for handle, alive in zip(shards, saved, strict=True):
        handle.alive = alive
    assert client.post("/v1/locate", content=data, headers=image).status_code == 200
    calls.close()


def test_a_batch_of_many_requests_is_one_and_each_gets_its_own(finished_run: Path) -> None:  # noqa: F811
    batches: list[int] = []

    def load(version: Version) -> Any:
        if version.digest == "away":
            raise NotHere("not now")

        def embed(batch: dict[str, Any]) -> dict[str, Any]:
            batches.append(len(batch["frames"]))
            marks = batch["frames"][:, 0, 0, 0, :1].astype(np.float32)
            failure = np.array(["bad" if m == 9 else None for m in marks[:, 0]], dtype=object)
            text = np.array([[len(c or "")] for c in batch["caption"]], dtype=np.float32)
            return {**batch, "image_embedding": marks, "text_embedding": text, "failure": failure, "other": marks}

        return embed

    def cut(digest: str, marks: list[int], side: int = 2) -> Cut:
        frames = np.zeros((len(marks), 1, side, side, 3), dtype=np.uint8)
        frames[:, 0, 0, 0, 0] = marks
        return Cut(Version("/run", digest), frames, tuple("x" * m if m else None for m in marks))

    items = [cut("a", [1, 2]), cut("b", [3]), cut("away", [4]), cut("a", [0]), cut("a", [5], side=4), cut("a", [9])]
    found = encode_together(Versions(load, keep_s=10.0), items)
    assert batches == [4, 1, 1]  # of one encoder and one shape
    assert isinstance(found[2], NotHere)
    columns = [found[i] for i in (0, 1, 3, 4, 5)]
    assert [c["image_embedding"].ravel().tolist() for c in columns] == [[1, 2], [3], [0], [5], [9]]  # type: ignore[index]
    assert [c["text_embedding"].ravel().tolist() for c in columns] == [[1, 2], [3], [0], [5], [9]]  # type: ignore[index]
    assert [c["failure"].tolist() for c in columns][-1] == ["bad"]  # type: ignore[index]
    assert "other" not in columns[0]


def test_an_index_that_does_not_fit_is_cut_into_as_many_pieces_as_it_takes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((1000, 1024)).astype(np.float32)
    names = [str(i) for i in range(1000)]
    index = GeocellIndex.build(vectors, np.arange(1000) % 50, names, np.zeros(1000), np.zeros(1000))
    index.save(tmp_path / "index")
    assert index_bytes(str(tmp_path)) == 2 * 1000 * 1024
    more = index.with_added(vectors[:100], np.zeros(100, int), [f"n{i}" for i in range(100)], *np.zeros((2, 100)))
    more.save(tmp_path / "index")
    assert index_bytes(str(tmp_path)) == 2 * 1100 * 1024
    assert Layout(max_index_mb=1).num_shards(str(tmp_path)) == 3
    assert Layout(max_index_mb=3).num_shards(str(tmp_path)) == 1
    assert Layout(max_index_mb=3, shards=2).num_shards(str(tmp_path)) == 2
    assert Layout(shards=4).num_shards("/nowhere") == 4
    both = Layout(encoder="apart", encoder_replicas=2, encoder_num_gpus=0.5, shards=3, shard_replicas=2)
    assert both.needed(3) == {"CPU": 8.0, "GPU": 1.0}
    assert Layout().needed(1) == {"CPU": 0.0, "GPU": 0.0}
    for wrong in ({"encoder": "alone"}, {"shards": 0}, {"encoder_wait_ms": -1.0}, {"max_index_mb": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Layout(**wrong)
