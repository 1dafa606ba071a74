"""The reference embeddings, one inverted list per geocell, searched only in the cells that the classifier names.

It is a FAISS IVF index whose lists *are* the geocells: there is no trained quantiser, and `search_preassigned` takes
the place of the coarse search. A global k-means or graph index answers about 12 % of the queries from outside the
predicted cells, so filtering afterwards is another algorithm. fp16 is the default because it reads half the bytes of
fp32 and reading is the limit; its answers are those of fp32 (recall@1 >= 0.999). Rows are sorted by (cell, pano_id),
so the same references make the same bytes in whatever order they arrive. `exact_search` is the reference in numpy and
the faster way for thousands of queries at once. Nothing here knows what a probability is: see `hedwig.retrieve`.

A reference may have one vector per frame (max_sim): all of them stand in its cell's list, and its score is the largest
over all pairs of its vectors and the query's. That is exact: of the (M-1)·V+1 nearest vectors to one query vector at
least M belong to different references, so who is not among them for any query vector is not among the best M.

FAISS files are not safe to parse when damaged (bit flips load silently or abort the process): `load` checks digests
before FAISS sees a byte, and bounds what it may allocate.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

__all__ = ["INDEX_FILE", "ROWS_FILE", "GeocellIndex", "check_digest", "exact_search"]

INDEX_FILE = "index.faiss"
ROWS_FILE = "rows.parquet"
_REBUILD = "run `hedwig index` again"
_ROWS_SCHEMA = pa.schema(
    [
        pa.field("pano_id", pa.string(), nullable=False),
        pa.field("lat", pa.float64(), nullable=False),
        pa.field("lon", pa.float64(), nullable=False),
        pa.field("cell_id", pa.int32(), nullable=False),
    ]
)

Floats = NDArray[np.float64]


class GeocellIndex:
    """References by geocell: who they are, where they are, and the nearest of them inside given cells.

    Attributes:
        pano_ids: (N,) object, str; like all three columns in index order, that is by (cell_id, pano_id).
        lat: (N,) float64, degrees.
        lon: (N,) float64, degrees.
        cell_ids: (N,) int32.
        num_cells: geocells, empty ones included.
        dim: D, width of an embedding.
        num_frames: V, the vectors of one reference; 1 unless every frame has its own.
    """

    def __init__(self, ivf: Any, rows: pa.Table) -> None:
        self._ivf = ivf
        self.pano_ids: NDArray[np.object_] = np.array(rows["pano_id"].to_pylist(), dtype=object)
        self.lat: Floats = rows["lat"].to_numpy()
        self.lon: Floats = rows["lon"].to_numpy()
        self.cell_ids: NDArray[np.int32] = rows["cell_id"].to_numpy()
        self.num_cells = int(ivf.nlist)
        self.dim = int(ivf.d)
        self.num_frames = int(ivf.ntotal) // len(rows) if len(rows) else 1

    def __len__(self) -> int:
        return len(self.pano_ids)

    @classmethod
    def build(
        cls,
        vectors: ArrayLike,
        cell_ids: ArrayLike,
        pano_ids: Sequence[str] | NDArray[Any],
        lat: ArrayLike,
        lon: ArrayLike,
        *,
        num_cells: int,
        storage: Literal["fp16", "fp32"] = "fp16",
    ) -> GeocellIndex:
        """Sort the references into their cells; the result does not depend on the order of the rows.

        Args:
            vectors: (N, D) embeddings of unit norm, or (N, V, D) those of every frame.
            cell_ids: (N,) int, each in 0..num_cells-1.
            pano_ids: (N,) unique names.
            lat: (N,) degrees.
            lon: (N,) degrees.
            num_cells: C, geocells, empty ones included.
            storage: bytes per component on disk and in the search, 2 or 4.

        Raises:
            ValueError: columns of different length, values that are not finite, ids that are double or out of range.
        """
        x = np.asarray(vectors, dtype=np.float32)
        cells = np.asarray(cell_ids)
        ids = np.asarray(pano_ids, dtype=object)
        lats, lons = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
        _check_references(x, cells, ids, lats, lons, num_cells)
        if storage not in ("fp16", "fp32"):
            raise ValueError(f"Unknown storage {storage!r}; use 'fp16' or 'fp32'.")
        order = np.lexsort((ids.astype(str), cells))
        rows = pa.table(
            [pa.array(ids[order], pa.string()), lats[order], lons[order], cells[order].astype(np.int32)],
            schema=_ROWS_SCHEMA,
        )
        dim, num_frames = x.shape[-1], x.shape[1] if x.ndim == 3 else 1
        quantiser = faiss.IndexFlatIP(dim)  # stays empty: the classifier does its work
        ivf: Any
        if storage == "fp16":
            ivf = faiss.IndexIVFScalarQuantizer(
                quantiser, dim, num_cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
            )
        else:
            ivf = faiss.IndexIVFFlat(quantiser, dim, num_cells, faiss.METRIC_INNER_PRODUCT)
        ivf.by_residual = False  # cell centres are not in the embedding space
        ivf.is_trained = True
        # FAISS counts vectors: number n belongs to row n // V.
        sorted_x = np.ascontiguousarray(x[order]).reshape(-1, dim)
        row_numbers = np.arange(len(sorted_x), dtype=np.int64)
        lists = np.repeat(cells[order].astype(np.int64), num_frames)
        ivf.add_core(len(sorted_x), faiss.swig_ptr(sorted_x), faiss.swig_ptr(row_numbers), faiss.swig_ptr(lists))
        return cls(ivf, rows)

    def search(
        self, queries: ArrayLike, cells: ArrayLike, num_neighbours: int, *, num_threads: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The nearest references of each query inside its own cells, by inner product.

        Args:
            queries: (B, D) embeddings of unit norm, or (B, V', D) several for each query.
            cells: (B, K) int, none twice; -1 is no cell. Empty cells give nothing.
            num_neighbours: M, how many at most.
            num_threads: OpenMP threads of this process from here on; None leaves them as they are.

        Returns:
            rows: (B, M) int64, best first, positions in `pano_ids`; -1 where there is nothing more.
            scores: (B, M), cosines for unit vectors, the largest over all pairs of a query's and a reference's vectors;
                -inf where the row is -1.

        Raises:
            ValueError: queries of another width or not finite, cells out of range, fewer than one neighbour.
        """
        several = np.asarray(queries, dtype=np.float32)
        if several.ndim == 3 or self.num_frames > 1:
            return self._search_pairs(several, cells, num_neighbours, num_threads)
        return self._search_vectors(several, cells, num_neighbours, num_threads)

    def _search_pairs(
        self, queries: NDArray[np.float32], cells: ArrayLike, num_neighbours: int, num_threads: int | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The search over all pairs of a query's vectors (B, V', D) and a reference's; see the module's text."""
        asking = queries.shape[1] if queries.ndim == 3 else 1
        least = (num_neighbours - 1) * self.num_frames + 1
        flat = queries.reshape(-1, queries.shape[-1])
        found, scores = self._search_vectors(flat, np.repeat(np.asarray(cells), asking, axis=0), least, num_threads)
        rows = np.where(found < 0, -1, found // self.num_frames).reshape(-1, asking * least)
        return _best_rows(rows, scores.reshape(rows.shape), num_neighbours)

    def _search_vectors(
        self, queries: NDArray[np.float32], cells: ArrayLike, num_neighbours: int, num_threads: int | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The nearest vectors (B, M) of single query vectors (B, D), by their number in FAISS."""
        x, wanted = _check_queries(queries, cells, num_neighbours, self.dim, self.num_cells)
        rows = np.full((len(x), num_neighbours), -1, dtype=np.int64)
        scores = np.full((len(x), num_neighbours), -np.inf, dtype=np.float32)
        if len(x) == 0 or wanted.shape[1] == 0:
            return rows, scores
        if num_threads is not None:
            faiss.omp_set_num_threads(num_threads)
        # The wrapper's own search_preassigned refuses parameters and reads nprobe from the index: a data race
        # between requests that consider different numbers of cells.
        parameters = faiss.SearchParametersIVF()
        parameters.nprobe = wanted.shape[1]
        unused = np.zeros(wanted.shape, dtype=np.float32)
        self._ivf.search_preassigned_c(
            len(x), faiss.swig_ptr(x), num_neighbours, faiss.swig_ptr(wanted), faiss.swig_ptr(unused),
            faiss.swig_ptr(scores), faiss.swig_ptr(rows), False, parameters,
        )  # fmt: skip
        scores[rows < 0] = -np.inf
        return rows, scores

    def vectors(self) -> NDArray[np.float32]:
        """(N, D), or (N, V, D) for V > 1, embeddings as stored (fp16 storage: rounded to it), in index order."""
        found = np.empty((len(self) * self.num_frames, self.dim), dtype=np.float32)
        lists = self._ivf.invlists
        starts = self.num_frames * np.searchsorted(self.cell_ids, np.arange(self.num_cells + 1))
        for cell in np.unique(self.cell_ids):
            start, stop = starts[cell], starts[cell + 1]
            codes = faiss.rev_swig_ptr(lists.get_codes(int(cell)), int((stop - start) * lists.code_size))
            stored = np.float16 if lists.code_size == 2 * self.dim else np.float32
            found[start:stop] = codes.view(stored).reshape(-1, self.dim)
        return found if self.num_frames == 1 else found.reshape(-1, self.num_frames, self.dim)

    def save(self, folder: str | Path) -> None:
        """Write `index.faiss` and `rows.parquet` into an existing or new local folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        faiss.write_index(self._ivf, str(path / INDEX_FILE))
        rows = pa.table([pa.array(self.pano_ids, pa.string()), self.lat, self.lon, self.cell_ids], schema=_ROWS_SCHEMA)
        pq.write_table(rows, path / ROWS_FILE)

    @classmethod
    def load(
        cls, folder: str | Path, digests: Mapping[str, str] | None = None, *, memory_map: bool = False
    ) -> GeocellIndex:
        """Read what `save` wrote, refusing anything that is not byte for byte what the manifest lists.

        Args:
            folder: a local folder.
            digests: file name -> sha256 in hex; other files in it are ignored. None trusts the folder.
            memory_map: read lists from disk as they are needed instead of all at once.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file differs from its digest, cannot be parsed, or the two do not belong together.
        """
        paths = {name: Path(folder) / name for name in (INDEX_FILE, ROWS_FILE)}
        for name, path in paths.items():
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; {_REBUILD}.")
            if digests is not None:
                check_digest(path, digests.get(name), _REBUILD)
        flags = faiss.IO_FLAG_MMAP if memory_map else 0
        with _allocation_limit(max(1 << 20, 2 * paths[INDEX_FILE].stat().st_size)):
            try:
                ivf = faiss.read_index(str(paths[INDEX_FILE]), flags)
            except (RuntimeError, MemoryError) as error:
                reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
                raise ValueError(
                    f"{paths[INDEX_FILE]} is not an index FAISS can read ({reason}); {_REBUILD}."
                ) from error
        try:
            rows = pq.read_table(paths[ROWS_FILE])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{paths[ROWS_FILE]} is not a readable table ({error}); {_REBUILD}.") from error
        _check_pair(ivf, rows, Path(folder))
        return cls(ivf, rows)


def exact_search(
    queries: ArrayLike, cells: ArrayLike, vectors: ArrayLike, cell_ids: ArrayLike, num_neighbours: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What `GeocellIndex.search` approximates, in numpy: queries grouped by cell, one matrix product per cell.

    Args:
        queries: (B, D).
        cells: (B, K) int; -1 is no cell.
        vectors: (N, D), in any order.
        cell_ids: (N,) int.
        num_neighbours: M.

    Returns:
        rows: (B, M) int64 positions in `vectors`, best first; -1 for none.
        scores: (B, M); -inf where the row is -1.
    """
    reference, owner = np.asarray(vectors, dtype=np.float32), np.asarray(cell_ids)
    x, wanted = _check_queries(
        queries, cells, num_neighbours, reference.shape[1], 1 + int(owner.max(initial=-1)), False
    )
    by_cell = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner, np.arange(owner.max(initial=-1) + 2), sorter=by_cell)
    rows = np.full((len(x), num_neighbours), -1, dtype=np.int64)
    scores = np.full((len(x), num_neighbours), -np.inf, dtype=np.float32)
    for cell in np.unique(wanted[wanted >= 0]):
        members = by_cell[starts[cell] : starts[cell + 1]] if cell + 1 < len(starts) else by_cell[:0]
        asking = np.flatnonzero((wanted == cell).any(axis=1))
        if len(members) == 0:
            continue
        candidates = x[asking] @ reference[members].T
        merged_scores = np.concatenate([scores[asking], candidates], axis=1)
        merged_rows = np.concatenate([rows[asking], np.broadcast_to(members, candidates.shape)], axis=1)
        if merged_scores.shape[1] > num_neighbours:
            top = np.argpartition(-merged_scores, num_neighbours - 1, axis=1)[:, :num_neighbours]
            merged_scores = np.take_along_axis(merged_scores, top, axis=1)
            merged_rows = np.take_along_axis(merged_rows, top, axis=1)
        best = np.lexsort((merged_rows, -merged_scores), axis=1)
        scores[asking] = np.take_along_axis(merged_scores, best, axis=1)
        rows[asking] = np.take_along_axis(merged_rows, best, axis=1)
    return rows, scores


def _best_rows(
    rows: NDArray[np.int64], scores: NDArray[np.float32], num: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(B, num) different rows, best first, each with its best score, of (B, L) with repetitions; -1 and -inf fill."""
    order = np.lexsort((-scores, rows), axis=1)
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    scores[:, 1:][rows[:, 1:] == rows[:, :-1]] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, :num]
    scores = np.take_along_axis(scores, best, axis=1)
    return np.where(np.isneginf(scores), -1, np.take_along_axis(rows, best, axis=1)), scores


def check_digest(path: Path, expected: str | None, remedy: str) -> None:
    """Refuse a file whose sha256 is not the expected one in hex; `remedy` ends the message.

    Raises:
        ValueError: another digest, or none to compare with.
    """
    if expected is None:
        raise ValueError(f"The manifest lists no digest for {path}, so it cannot be trusted; {remedy}.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise ValueError(
            f"{path} is damaged or from another build: its sha256 is {found[:12]}…, the manifest says "
            f"{expected[:12]}…; {remedy}."
        )


def _check_references(
    x: NDArray[np.float32], cells: NDArray[Any], ids: NDArray[Any], lat: Floats, lon: Floats, num_cells: int
) -> None:
    if x.ndim not in (2, 3) or 0 in x.shape[1:] or any(a.shape != x.shape[:1] for a in (cells, ids, lat, lon)):
        raise ValueError(
            f"vectors must be (N, D) or (N, V, D) with N cells, ids and positions; got {x.shape}, cells {cells.shape}, "
            f"ids {ids.shape}, lat {lat.shape}, lon {lon.shape}."
        )
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))
        raise ValueError(f"{len(bad)} embeddings are not finite, first {ids[bad[0]]!r}; embed these panoramas again.")
    if not (np.isfinite(lat).all() and np.isfinite(lon).all()):
        raise ValueError("A reference without a position is of no use as an answer; leave those rows out.")
    if len(x) and (not np.issubdtype(cells.dtype, np.integer) or cells.min() < 0 or cells.max() >= num_cells):
        raise ValueError(
            f"cell_ids must be integers in 0..{num_cells - 1}; got {cells.dtype} from {cells.min()} to {cells.max()}."
        )
    if len(set(ids.tolist())) != len(ids):
        names, counts = np.unique(ids.astype(str), return_counts=True)
        raise ValueError(f"pano_id must be unique; {names[counts > 1][:3].tolist()} occur more than once.")


def _check_queries(
    queries: ArrayLike, cells: ArrayLike, num_neighbours: int, dim: int, num_cells: int, bounded: bool = True
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    x = np.ascontiguousarray(queries, dtype=np.float32)
    wanted = np.ascontiguousarray(cells, dtype=np.int64)
    if x.ndim != 2 or x.shape[1] != dim or wanted.ndim != 2 or len(wanted) != len(x):
        raise ValueError(
            f"queries must be (B, {dim}) and cells (B, K); got {x.shape} and {wanted.shape}. Were the queries made "
            "by the model that made the index?"
        )
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        raise ValueError(f"{len(bad)} of {len(x)} queries are not finite, first row {bad[0]}; take them out.")
    if bounded and wanted.size and (wanted.min() < -1 or wanted.max() >= num_cells):
        raise ValueError(
            f"cells must lie in -1..{num_cells - 1}; got {wanted.min()}..{wanted.max()}. "
            "Do the classifier and the index belong to the same geocells?"
        )
    if num_neighbours < 1:
        raise ValueError(f"num_neighbours must be at least 1, got {num_neighbours}.")
    return x, wanted


def _check_pair(ivf: Any, rows: pa.Table, folder: Path) -> None:
    """The FAISS file is one of ours, and its lists hold exactly the rows of the table."""
    if not rows.schema.equals(_ROWS_SCHEMA):
        raise ValueError(f"{folder / ROWS_FILE} has the columns {rows.schema.names}, not ours; {_REBUILD}.")
    if not isinstance(ivf, faiss.IndexIVF) or ivf.metric_type != faiss.METRIC_INNER_PRODUCT or ivf.by_residual:
        raise ValueError(f"{folder / INDEX_FILE} is a {type(ivf).__name__}, not a geocell index; {_REBUILD}.")
    cells = rows["cell_id"].to_numpy()
    lists: Any = ivf.invlists
    sizes = np.array([lists.list_size(cell) for cell in range(ivf.nlist)])
    num_frames = max(1, ivf.ntotal // max(1, len(rows)))
    if num_frames * len(rows) != ivf.ntotal or (len(cells) and (cells.min() < 0 or cells.max() >= ivf.nlist)):
        fits = False
    else:
        wanted = num_frames * np.bincount(cells, minlength=ivf.nlist)
        fits = bool((np.diff(cells) >= 0).all() and (wanted == sizes).all())
    if not fits:
        raise ValueError(
            f"{folder / INDEX_FILE} ({ivf.ntotal} vectors) and {folder / ROWS_FILE} ({len(rows)} rows) are not from "
            f"the same build; {_REBUILD}."
        )


@contextlib.contextmanager
def _allocation_limit(num_bytes: int) -> Iterator[None]:
    """Bound what FAISS believes from a file's header: 2.6 kB can otherwise ask for gigabytes. Old FAISS: no bound."""
    set_limit = getattr(faiss, "set_deserialization_vector_byte_limit", None)
    if set_limit is None:
        yield
        return
    previous = faiss.get_deserialization_vector_byte_limit()
    set_limit(num_bytes)
    try:
        yield
    finally:
        set_limit(previous)
