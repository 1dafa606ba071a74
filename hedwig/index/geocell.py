"""`GeocellIndex`: the references with their vectors, built, opened, added to, and searched inside given cells."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from hedwig.index import codecs
from hedwig.index.building import Batch, check_references, sorted_rows, write_streamed
from hedwig.index.codecs import Codec
from hedwig.index.files import ADDED_FOLDER, HEADER_FILE
from hedwig.index.products import GatheredProduct
from hedwig.index.references import References
from hedwig.index.stored import Stored, read_parts, write_stored

__all__ = ["GeocellIndex"]

_BATCH_ROWS = 16_384

Ints = NDArray[np.int64]
Scores = NDArray[np.float32]


class GeocellIndex(References):
    """References with their vectors. `build` or `open` one; it never changes, additions and removals give another."""

    def __init__(self, parts: Sequence[Stored], removed: Ints | None = None) -> None:
        super().__init__(parts[0].header, [part.rows for part in parts], removed)
        self._parts = tuple(parts)
        self._gathered: tuple[GatheredProduct, ...] = ()

    @classmethod
    def build(
        cls,
        vectors: ArrayLike,
        cell_ids: ArrayLike,
        pano_ids: Any,
        lat: ArrayLike,
        lon: ArrayLike,
        *,
        num_cells: int | None = None,
        codec: Codec = "fp16",
    ) -> GeocellIndex:
        """Sort the references into their cells; the result does not depend on the order of the rows.

        Args:
            vectors: (N, D) embeddings of unit norm, or (N, V, D) those of every frame.
            cell_ids: (N,) int, each in 0..num_cells-1.
            pano_ids: (N,) unique str: a sequence, an object array or a column of Arrow.
            lat: (N,) degrees.
            lon: (N,) degrees.
            num_cells: C, geocells, empty ones included; None: up to the largest that occurs.
            codec: how vectors are kept: fp16; fp32, twice the bytes; sq8 or pq, searched in a half or a sixteenth of
                the memory of fp16 and scored again on fp16 originals.

        Raises:
            ValueError: columns of different length, values that are not finite, ids that are double or out of range.
        """
        codecs.check_codec(codec)
        some = check_references(vectors, cell_ids, pano_ids, lat, lon, num_cells)
        rows, order = sorted_rows(some.rows)
        if num_cells is None:
            num_cells = int(rows["cell_id"][-1].as_py()) + 1 if len(rows) else 0
        return cls([Stored.of(some.vectors[order], rows, codec, num_cells)])

    @classmethod
    def build_streamed(
        cls,
        batches: Iterable[Batch],
        folder: str | Path,
        *,
        num_cells: int | None = None,
        codec: Codec = "fp16",
        memory_bytes: int = 1 << 29,
    ) -> GeocellIndex:
        """Build from more than fits into memory, into a folder; byte for byte what `build` and `save` would write.

        Args:
            batches: tuples ``(vectors, cell_ids, pano_ids, lat, lon)`` as `build` takes them, in any order; at least
                one, which may be empty.
            folder: where the index goes, and while it is sorted up to twice its vectors more.
            num_cells: see `build`.
            codec: see `build`.
            memory_bytes: for vectors; names, places and cells are in memory besides.

        Returns:
            The index, opened.
        """
        write_streamed(batches, Path(folder), num_cells=num_cells, codec=codec, memory_bytes=memory_bytes)
        return cls.open(folder)

    def _search_parts(self, x: Scores, wanted: Ints, top_k: int, rerank: int) -> list[tuple[Ints, Scores]]:
        if self._gathered:
            return [part.search(x, wanted, top_k) for part in self._gathered]
        return [part.segment.search(x, wanted, top_k, rerank) for part in self._parts]

    def _search_one(self, query: Any, cells: Any, top_k: int) -> tuple[Ints, Scores] | None:
        return None if self._gathered else self._parts[0].segment.search_one(query, cells, top_k)

    def vectors(self) -> NDArray[np.float32]:
        """(R, D), or (R, V, D) for V > 1, embeddings as stored (all but fp32: rounded to fp16), by row."""
        found = np.concatenate([part.segment.vectors() for part in self._parts])
        return found if self.num_frames == 1 else found.reshape(-1, self.num_frames, self.dim)

    def batches(self) -> Iterator[Batch]:
        """What can be found, as `build_streamed` takes it."""
        first = 0
        for part in self._parts:
            for start in range(0, max(1, len(part.rows)), _BATCH_ROWS):
                stop = min(start + _BATCH_ROWS, len(part.rows))
                keep = ~self._gone[first + start : first + stop]
                vectors = part.segment.vectors(slice(start * self.num_frames, stop * self.num_frames))
                rows = part.rows.slice(start, stop - start).filter(pa.array(keep))
                columns = [rows[name].to_numpy() for name in ("cell_id", "lat", "lon")]
                shaped = vectors if self.num_frames == 1 else vectors.reshape(-1, self.num_frames, self.dim)
                yield shaped[keep], columns[0], rows["pano_id"], columns[1], columns[2]
            first += len(part.rows)

    def with_added(
        self, vectors: ArrayLike, cell_ids: ArrayLike, pano_ids: Any, lat: ArrayLike, lon: ArrayLike
    ) -> GeocellIndex:
        """This index and more references, searched beside it; nothing is learnt again and nothing large is copied.

        Args:
            vectors: (n, D), or (n, V, D), as in `build`; so are the other columns.
            cell_ids: (n,).
            pano_ids: (n,); names of removed references may come back.
            lat: (n,).
            lon: (n,).

        Raises:
            ValueError: a name is there already, or anything that `build` refuses.
        """
        new = check_references(vectors, cell_ids, pano_ids, lat, lon, self.num_cells)
        if new.vectors.shape[1:] != (self.num_frames, self.dim):
            raise ValueError(
                f"Added vectors must be (n, {self.num_frames}, {self.dim}) or without frames (n, {self.dim}); "
                f"got {new.vectors.shape}."
            )
        there = self.pano_ids.lookup(new.rows["pano_id"].to_pylist())
        if len(double := there[~self._gone[there] & (there >= 0)]):
            raise ValueError(
                f"{len(double)} of the added references are in the index, such as {self.pano_ids[double[0]]!r}; "
                "remove them first."
            )
        main, removed = self._parts[0], self._removed
        x, rows = new.vectors, new.rows
        if len(self._parts) > 1:  # one addition at most: the earlier one is sorted in again, without what was removed
            earlier, num = self._parts[1], len(main.rows)
            keep = ~self._gone[num:-1]
            old = earlier.segment.vectors().reshape(-1, self.num_frames, self.dim)[keep]
            x = np.concatenate([old, x])
            rows = pa.concat_tables([earlier.rows.filter(pa.array(keep)), rows])
            removed = removed[removed < num]
        rows, order = sorted_rows(rows)
        added = Stored.of(x[order], rows, self.codec, self.num_cells, main.segment.codebook)
        return self._like(GeocellIndex([main, added], removed))

    def with_removed(self, pano_ids: Sequence[str] | NDArray[Any]) -> GeocellIndex:
        """This index without some references: their rows stay and are passed over.

        Raises:
            ValueError: one of them is not there.
        """
        names = np.unique(np.asarray(pano_ids, dtype=object))
        rows = self.pano_ids.lookup(names)
        missing = (rows < 0) | self._gone[rows]
        if missing.any():
            raise ValueError(f"{missing.sum()} of the names are not in the index, such as {names[missing][0]!r}.")
        return self._like(GeocellIndex(self._parts, np.union1d(self._removed, rows)))

    def compacted(self) -> GeocellIndex:
        """The same references sorted into one part: byte for byte what a fresh build of them would be.

        For more than fits into memory: ``GeocellIndex.build_streamed(index.batches(), folder, …)``.
        """
        vectors, cells, names, lat, lon = zip(*self.batches(), strict=True)
        built = GeocellIndex.build(
            np.concatenate(vectors),
            np.concatenate(cells),
            pa.chunked_array([chunk for column in names for chunk in column.chunks], pa.string()),
            np.concatenate(lat),
            np.concatenate(lon),
            num_cells=self.num_cells,
            codec=self.codec,
        )
        return self._like(built)

    def on(self, device: str) -> GeocellIndex:
        """This index searched on a device of torch, exactly, in its stored fp16 or fp32 vectors; "cpu" is without."""
        other = copy.copy(self)
        other._gathered = ()
        if device != "cpu":
            other._gathered = tuple(
                GatheredProduct(part.segment.originals, part.segment.starts, device) for part in self._parts
            )
        return other

    def save(self, folder: str | Path) -> None:
        """Write the index into an existing or new local folder: a header, flat arrays and the table of rows."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        more: dict[str, Any] = {}
        if len(self._parts) > 1:
            more[f"{ADDED_FOLDER}/{HEADER_FILE}"] = write_stored(path / ADDED_FOLDER, self._parts[1], {})
        write_stored(path, self._parts[0], more, self._removed)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        digests: Mapping[str, str] | None = None,
        *,
        memory_map: bool = True,
        device: str = "cpu",
    ) -> GeocellIndex:
        """Open what `save` or `build_streamed` wrote, refusing anything that is not byte for byte the same.

        Args:
            folder: a local folder.
            digests: file name -> sha256 in hex, as the artefact's manifest lists them; other files in it are ignored.
                None: the digests in the index's own header count, which is enough against damage and not against
                somebody who rewrites the folder.
            memory_map: leave the vectors on disk and let the system keep what is used; else read them.
            device: see `on`.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file differs from its digest, or the files do not belong together.
        """
        path = Path(folder)
        listed, removed = read_parts(path, digests, vectors_too=True, memory_map=memory_map)
        parts = [
            Stored(part.header, part.vectors(memory_map=memory_map, checked=True), part.rows, part.folder)
            for part in listed
        ]
        return cls(parts, removed).on(device)

    def _like(self, other: GeocellIndex) -> GeocellIndex:
        return other.on(self._gathered[0].device) if self._gathered else other
