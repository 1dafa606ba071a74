"""An index in pieces: consecutive geocells to each shard, and an index that asks the shards and has no vectors.

Shards take consecutive cells, cut where the vectors' bytes are shared out most evenly. Neighbouring cells often are
neighbouring numbers, so the likely cells of a query lie with one or two shards; and a shard maps and checks one stretch
of each file instead of pieces of all. `ShardedIndex` keeps names, places and cells, which are a thirtieth of the whole,
and knows from them alone who owns what: the cut follows from the counts and needs no file of its own.

What it answers is bit for bit what `GeocellIndex` answers. A score does not depend on who else is asked for or found;
equal ones go by number; and for sq8 and pq a shard returns its candidates with both of their scores, so that the
candidates of all shards compete before any is scored again. Nothing here knows how a shard is reached: see
`hedwig.serving.shards`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hedwig.index import codecs
from hedwig.index.exact import best_of
from hedwig.index.fetching import Fetch
from hedwig.index.references import References
from hedwig.index.segment import Segment
from hedwig.index.stored import Listed, read_parts

__all__ = ["Found", "IndexShard", "Question", "ShardedIndex", "partition_cells"]

Ints = NDArray[np.int64]
Scores = NDArray[np.float32]

MOST_SHARDS = 4096


@dataclass(frozen=True)
class Question:
    """What one shard is asked; plain arrays and numbers, so that it can travel.

    Attributes:
        queries: (B, D), those of a batch that ask for one of its cells.
        cells: (B, K) int64, of this shard; -1 is no cell.
        top_k: M.
        rerank: see `Segment.search`.
    """

    queries: Scores
    cells: Ints
    top_k: int
    rerank: int


@dataclass(frozen=True)
class Found:
    """What one shard found in one part of the index, best first.

    Attributes:
        numbers: (B, n) int64 numbers of vectors in the whole part; -1 for none.
        ranks: (B, n) scores by the codes, which decide who is a candidate.
        scores: (B, n) scores by the originals; for fp16 and fp32 the same array.
    """

    numbers: Ints
    ranks: Scores
    scores: Scores


Ask = Callable[[Mapping[int, Question]], Mapping[int, Sequence[Found]]]


def partition_cells(sizes: NDArray[np.int64], num_shards: int) -> Ints:
    """Where the shards begin and end: shard s owns the cells ``bounds[s]`` to ``bounds[s + 1]``.

    A shard holds at most an equal share and one cell more.

    Args:
        sizes: (C,) int64, what each cell holds.
        num_shards: S.

    Returns:
        (S + 1,) int64, from 0 to C; a shard may be empty.

    Raises:
        ValueError: fewer than one shard, or more than can be meant.
    """
    if not 1 <= num_shards <= MOST_SHARDS:
        raise ValueError(f"shards is {num_shards}; it must lie in 1..{MOST_SHARDS}.")
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    shares = np.arange(1, num_shards, dtype=np.int64) * ends[-1]
    above = np.searchsorted(ends * num_shards, shares)
    below = np.maximum(above - 1, 0)
    nearer = shares - ends[below] * num_shards <= ends[above] * num_shards - shares
    return np.concatenate([[0], np.where(nearer, below, above), [len(sizes)]])


class IndexShard:
    """The vectors of one shard.

    Args:
        segments: of every part of the index, each of these cells alone.
        first: the number of each segment's first vector in its part.
        cells: which cells these are.
    """

    def __init__(self, segments: Sequence[Segment], first: Sequence[int], cells: range) -> None:
        self._segments, self._first, self.cells = tuple(segments), tuple(first), cells

    @classmethod
    def open(
        cls,
        folder: str | Path,
        digests: Mapping[str, str] | None,
        *,
        shard: int,
        num_shards: int,
        memory_map: bool = True,
        fetch: Fetch | None = None,
    ) -> IndexShard:
        """Open one shard of what `GeocellIndex.save` wrote; only its own vectors are checked and mapped.

        Args:
            folder: a local folder.
            digests: see `GeocellIndex.open`.
            shard: in 0..num_shards-1.
            num_shards: S.
            memory_map: see `GeocellIndex.open`.
            fetch: see `hedwig.index.fetching`.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file differs from its digest, or there is no such shard.
        """
        if not 0 <= shard < num_shards:
            raise ValueError(f"shard is {shard}; there are {num_shards}, from 0.")
        parts, _ = read_parts(Path(folder), digests, columns=["cell_id"])
        bounds = partition_cells(_sizes(parts), num_shards)
        cells = range(int(bounds[shard]), int(bounds[shard + 1]))
        segments = [part.vectors(cells, memory_map=memory_map, fetch=fetch) for part in parts]
        return cls(segments, [int(part.starts[cells.start]) for part in parts], cells)

    def __len__(self) -> int:
        """Vectors."""
        return sum(len(segment) for segment in self._segments)

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, which a search scans."""
        return sum(segment.codes.nbytes for segment in self._segments)

    def search(self, question: Question) -> list[Found]:
        """What is found, part by part.

        Raises:
            ValueError: a cell that this shard does not own: whoever asks has cut the index otherwise.
        """
        asked = question.cells[question.cells >= 0]
        if asked.size and not self.cells.start <= asked.min() <= asked.max() < self.cells.stop:
            raise ValueError(f"This shard has the cells {self.cells} and is asked for {asked.min()}..{asked.max()}.")
        x = np.ascontiguousarray(question.queries, dtype=np.float32)
        wanted = np.ascontiguousarray(question.cells, dtype=np.int64)
        found = []
        for segment, first in zip(self._segments, self._first, strict=True):
            num = max(question.top_k, question.rerank) if segment.is_coded else question.top_k
            numbers, ranks = segment.candidates(x, wanted, num)
            scores = segment.scored(x, numbers) if segment.is_coded and len(segment) else ranks
            found.append(Found(np.where(numbers < 0, -1, first + numbers), ranks, scores))
        return found


class ShardedIndex(References):
    """The references of an index whose vectors are with shards.

    Args:
        parts: the parts of the index, without their vectors.
        removed: rows that are passed over.
        num_shards: S.
        ask: asks shards by number, all at once, and returns what each found.
    """

    def __init__(self, parts: Sequence[Listed], removed: Ints, num_shards: int, ask: Ask) -> None:
        super().__init__(parts[0].header, [part.rows for part in parts], removed)
        sizes = _sizes(parts)
        self.bounds = partition_cells(sizes, num_shards)
        owner = np.searchsorted(self.bounds, np.arange(self.num_cells), side="right") - 1
        # Nobody is asked for an empty cell; the last one stands for -1.
        self._owner = np.append(np.where(sizes > 0, owner, -1), -1)
        self._ask = ask

    @classmethod
    def open(cls, folder: str | Path, digests: Mapping[str, str] | None, *, num_shards: int, ask: Ask) -> ShardedIndex:
        """Open names, places and cells of what `GeocellIndex.save` wrote; its vectors need not be there.

        Args:
            folder: a local folder.
            digests: see `GeocellIndex.open`.
            num_shards: S.
            ask: see the class.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file differs from its digest.
        """
        parts, removed = read_parts(Path(folder), digests)
        return cls(parts, removed, num_shards, ask)

    def _search_parts(self, x: Scores, wanted: Ints, top_k: int, rerank: int) -> list[tuple[Ints, Scores]]:
        owner = self._owner[wanted]
        coded = codecs.is_coded(self.codec)
        questions, asking = {}, {}
        for shard in np.unique(owner[owner >= 0]).tolist():
            theirs = owner == shard
            asking[shard] = theirs.any(axis=1).nonzero()[0]
            cells = np.where(theirs, wanted, -1)[asking[shard]]
            cells = cells[:, (cells >= 0).any(axis=0)]
            questions[shard] = Question(x[asking[shard]], cells, top_k, rerank)
        answers = self._ask(questions) if questions else {}
        num = max(top_k, rerank) if coded else top_k
        joined = []
        for part in range(len(self._num_rows)):
            shape = (len(x), max(1, len(answers)) * num)
            numbers = np.full(shape, -1, dtype=np.int64)
            ranks, scores = np.full((2, *shape), -np.inf, dtype=np.float32)
            for place, (shard, found) in enumerate(answers.items()):
                rows, columns = asking[shard], slice(place * num, (place + 1) * num)
                numbers[rows, columns], ranks[rows, columns] = found[part].numbers, found[part].ranks
                scores[rows, columns] = found[part].scores
            best = np.lexsort((numbers, -ranks), axis=1)[:, :num]
            numbers, scores = np.take_along_axis(numbers, best, axis=1), np.take_along_axis(scores, best, axis=1)
            joined.append(best_of(numbers, scores, top_k) if coded else (numbers, scores))
        return joined


def _sizes(parts: Sequence[Listed]) -> Ints:
    """(C,) vectors of each cell, in all parts."""
    total: Ints = np.sum([np.diff(part.starts) for part in parts], axis=0, dtype=np.int64)
    return total
