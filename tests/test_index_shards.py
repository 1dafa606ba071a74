"""An index in pieces answers what the whole one answers, bit for bit, however it is cut and whatever is asked."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_world import DIM, NUM_CELLS, digests, references, some_queries, unit

from hedwig.index import Found, GeocellIndex, IndexShard, Question, ShardedIndex, fetching, partition_cells
from hedwig.index.codecs import code_bytes


def saved(folder: Path, *, codec: Any = "fp16", frames: int = 1, changed: bool = False, doubles: bool = False) -> Path:
    """An index on disk: of skewed cells, with additions and removals, or with many equal vectors."""
    rng = np.random.default_rng(5)
    some = references(1500, seed=2)
    some["cell_ids"] = np.minimum(some["cell_ids"], rng.integers(0, NUM_CELLS, 1500))  # the first cells are large
    if frames > 1:
        other = [unit(rng.standard_normal((1500, DIM))) for _ in range(frames - 1)]
        some["vectors"] = np.stack([some["vectors"], *other], axis=1)
    if doubles:
        some["vectors"] = some["vectors"][rng.integers(0, 12, 1500)]
    index = GeocellIndex.build(**some, num_cells=NUM_CELLS, codec=codec)
    if changed:
        new = references(120, seed=3)
        shape = (120, frames, DIM) if frames > 1 else (120, DIM)
        vectors = unit(rng.standard_normal((120 * frames, DIM))).reshape(shape)
        index = index.with_added(**{**new, "vectors": vectors, "pano_ids": [f"new{i}" for i in range(120)]})
        index = index.with_removed([*some["pano_ids"][:300], "new3", "new5"])
    index.save(folder)
    return folder


def sharded(folder: Path, num_shards: int, asked: list[Mapping[int, Question]] | None = None) -> ShardedIndex:
    """The same index in shards of this process; what travels is pickled as it would be."""
    files = digests(folder)
    shards = [IndexShard.open(folder, files, shard=s, num_shards=num_shards) for s in range(num_shards)]

    def ask(questions: Mapping[int, Question]) -> Mapping[int, Sequence[Found]]:
        if asked is not None:
            asked.append(questions)
        return {s: pickle.loads(pickle.dumps(shards[s].search(q))) for s, q in reversed(questions.items())}

    return ShardedIndex.open(folder, files, num_shards=num_shards, ask=ask)


def same(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(a[0], b[0])
    assert a[1].tobytes() == b[1].tobytes()


@pytest.mark.parametrize("codec", ["fp16", "fp32", "sq8", "pq"])
@pytest.mark.parametrize(
    ("frames", "changed", "doubles"), [(1, False, False), (1, True, False), (3, True, False), (1, False, True)]
)
def test_shards_answer_bit_for_bit_what_the_whole_index_answers(
    tmp_path: Path, codec: Any, frames: int, changed: bool, doubles: bool
) -> None:
    folder = saved(tmp_path, codec=codec, frames=frames, changed=changed, doubles=doubles)
    whole = GeocellIndex.open(folder, digests(folder))
    for num_shards in (1, 3, 7):
        index = sharded(folder, num_shards)
        for num_queries, top_k in ((0, 3), (1, 5), (7, 1), (64, 40)):
            queries, cells = some_queries(num_queries, seed=num_queries) if num_queries else (np.zeros((0, DIM)),) * 2
            cells = np.asarray(cells, dtype=np.int64)
            cells[: num_queries // 2, 1:3] = -1
            same(index.search_rows(queries, cells, top_k), whole.search_rows(queries, cells, top_k))
            if frames > 1 and num_queries:
                several = unit(np.random.default_rng(9).standard_normal((num_queries * 2, DIM)))
                asked = several.reshape(num_queries, 2, DIM)
                same(index.search_rows(asked, cells, top_k), whole.search_rows(asked, cells, top_k))
        names, _ = index.search(queries, cells, 3)
        assert names.tolist() == whole.search(queries, cells, 3)[0].tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[GeocellIndex, dict[int, ShardedIndex]]:
    folder = saved(tmp_path_factory.mktemp("index"), changed=True, doubles=True)
    return GeocellIndex.open(folder), {n: sharded(folder, n) for n in (2, 3, 5, 60)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_question_has_the_same_answer(
    world: tuple[GeocellIndex, dict[int, ShardedIndex]], data: st.DataObject
) -> None:
    whole, pieces = world
    index = pieces[data.draw(st.sampled_from(sorted(pieces)))]
    num, width = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    lists = st.lists(st.integers(0, NUM_CELLS - 1), min_size=width, max_size=width, unique=True)
    cells = np.array(data.draw(st.lists(lists, min_size=num, max_size=num)))
    cells[np.random.default_rng(data.draw(st.integers(0, 99))).random(cells.shape) < 0.2] = -1
    queries = unit(np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((num, DIM)))
    top_k = data.draw(st.integers(1, 60))
    same(index.search_rows(queries, cells, top_k), whole.search_rows(queries, cells, top_k))


def test_only_the_owners_of_the_chosen_cells_are_asked_and_for_these_cells_alone(tmp_path: Path) -> None:
    asked: list[Mapping[int, Question]] = []
    index = sharded(saved(tmp_path), 4, asked)
    owner = np.searchsorted(index.bounds, np.arange(NUM_CELLS), side="right") - 1
    full = np.unique(index.cell_ids)
    first, last = full[owner[full] == 0], full[owner[full] == 3]
    queries = unit(np.random.default_rng(0).standard_normal((3, DIM)))
    index.search_rows(queries, [[first[0], first[1]], [first[2], last[0]], [last[1], -1]], 2)
    questions = asked.pop()
    assert sorted(questions) == [0, 3]
    np.testing.assert_array_equal(questions[0].queries, queries[:2])
    np.testing.assert_array_equal(questions[3].queries, queries[1:])
    assert set(questions[0].cells.ravel().tolist()) <= {-1, *first.tolist()}
    empty = np.setdiff1d(np.arange(NUM_CELLS), full)[0]
    rows, scores = index.search_rows(queries[:1], [[empty, -1]], 2)
    assert (rows.tolist(), np.isneginf(scores).all(), asked) == ([[-1, -1]], True, [])
    with pytest.raises(ValueError, match="not finite"):
        index.search_rows(np.full((1, DIM), np.nan), [[0]], 1)


@pytest.mark.parametrize("codec", ["fp16", "fp32"])
def test_scores_do_not_depend_on_who_else_asks(tmp_path: Path, codec: Any) -> None:
    folder = saved(tmp_path, codec=codec)
    whole, index = GeocellIndex.open(folder), sharded(folder, 4)
    full = np.unique(whole.cell_ids)
    cells = np.array([full[:2]] * 5 + [full[-2:]] * 5)
    queries = unit(np.random.default_rng(3).standard_normal((10, DIM)))
    same(index.search_rows(queries, cells, 40), whole.search_rows(queries, cells, 40))
    alone = [whole.search_rows(queries[i : i + 1], cells[i : i + 1], 40)[1] for i in range(10)]
    assert np.concatenate(alone).tobytes() == whole.search_rows(queries, cells, 40)[1].tobytes()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=0, max_size=60), st.integers(1, 12))
def test_the_cut_is_a_cut_and_even(sizes: list[int], num_shards: int) -> None:
    cells = np.array(sizes, dtype=np.int64)
    bounds = partition_cells(cells, num_shards)
    assert (len(bounds), bounds[0], bounds[-1]) == (num_shards + 1, 0, len(sizes))
    assert (np.diff(bounds) >= 0).all()
    held = [int(cells[a:b].sum()) for a, b in pairwise(bounds)]
    assert max(held) <= cells.sum() / num_shards + cells.max(initial=0)
    np.testing.assert_array_equal(bounds, partition_cells(cells.copy(), num_shards))


@pytest.mark.parametrize("codec", ["fp16", "pq"])
def test_a_shard_maps_and_checks_its_own_vectors_and_no_others(
    tmp_path: Path, codec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hedwig.index.files.CHUNK_BYTES", 1024)
    folder = saved(tmp_path, codec=codec, changed=True)
    shards = [IndexShard.open(folder, None, shard=s, num_shards=3) for s in range(3)]
    assert sum(len(shard) for shard in shards) == 1620
    assert sum(shard.num_bytes for shard in shards) == 1620 * code_bytes(codec, DIM)
    assert max(shard.num_bytes for shard in shards) < 0.6 * sum(shard.num_bytes for shard in shards)
    codes = folder / "codes.bin"
    spoilt = bytearray(codes.read_bytes())
    spoilt[-1] ^= 1
    codes.write_bytes(spoilt)
    IndexShard.open(folder, None, shard=0, num_shards=3)
    ShardedIndex.open(folder, None, num_shards=3, ask=lambda questions: {})  # it has names, and asks for vectors
    for opened in (
        lambda: IndexShard.open(folder, None, shard=2, num_shards=3),
        lambda: GeocellIndex.open(folder),
    ):
        with pytest.raises(ValueError, match=r"codes\.bin is damaged"):
            opened()
    with pytest.raises(ValueError, match="there are 3"):
        IndexShard.open(folder, None, shard=3, num_shards=3)


def test_who_cuts_otherwise_is_refused_instead_of_half_answered(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    shard = IndexShard.open(folder, None, shard=0, num_shards=3)
    question = Question(np.zeros((1, DIM), np.float32), np.array([[0, shard.cells.stop]]), 3, 32)
    with pytest.raises(ValueError, match="is asked for 0"):
        shard.search(question)


@pytest.mark.parametrize("codec", ["fp16", "sq8"])
def test_of_an_index_on_object_storage_a_shard_fetches_its_own_stretch(
    tmp_path: Path, codec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hedwig.index.files.CHUNK_BYTES", 1024)
    monkeypatch.setattr("hedwig.index.fetching.CHUNK_BYTES", 1024)
    folder = saved(tmp_path / "there", codec=codec, changed=True)
    whole = GeocellIndex.open(folder)
    monkeypatch.setattr("hedwig.index.fetching.is_remote", lambda path: True)
    read: list[int] = []
    read_range = fetching._read_range

    def counted(path: str, start: int, length: int) -> bytes:
        read.append(length)
        return bytes(read_range(path, start, length))

    monkeypatch.setattr("hedwig.index.fetching._read_range", counted)
    shards: list[IndexShard] = []

    def ask(questions: Mapping[int, Question]) -> Mapping[int, Sequence[Found]]:
        return {shard: shards[shard].search(question) for shard, question in questions.items()}

    for shard in range(3):
        with fetching.local_index(str(folder)) as (path, fetch):
            assert not (path / "codes.bin").read_bytes().strip(b"\0")
            assert path != folder
            shards.append(IndexShard.open(path, digests(folder), shard=shard, num_shards=3, fetch=fetch))
            names = ShardedIndex.open(
                path,
                digests(folder),
                num_shards=3,
                ask=lambda asked: {s: shards[s].search(q) for s, q in asked.items()},
            )
        assert not path.exists()
    total = sum((folder / name).stat().st_size for name in ("codes.bin", "added/codes.bin"))
    if codec == "sq8":
        total += sum((folder / name).stat().st_size for name in ("originals.bin", "added/originals.bin"))
    assert total <= sum(read) <= total + 12 * 1024  # each stretch may begin and end within a chunk
    queries, cells = some_queries(20)
    same(names.search_rows(queries, cells, 5), whole.search_rows(queries, cells, 5))
