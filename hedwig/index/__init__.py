"""The reference embeddings, one inverted list per geocell, searched only in the cells that the classifier names.

It is an inverted file whose lists *are* the geocells: there is no trained quantiser, and the classifier takes the place
of the coarse search. A global k-means or graph index answers about 12 % of the queries from outside the
predicted cells, so filtering afterwards is another algorithm. Rows are sorted by (cell, pano_id), so the same
references make the same bytes in whatever order they arrive. Nothing here knows what a probability is: see
`hedwig.retrieve`.

    files      what lies on disk, and the digests that it must pass before anything reads it
    codecs     fp16, fp32, sq8, pq
    building   sorting, in memory or past it
    segment    one sorted array of codes, and the search in it
    kernel     the scan itself, compiled for the processor; kernel_code: its program; products: the scan on a GPU
    stored     a segment with its rows, written and read
    exact      the reference in numpy
    names      a column of names that is read when asked
    references who they are and where, and how what was found among the vectors becomes the nearest of them
    geocell    `GeocellIndex`, which has the vectors too, and knows what was added and removed
    fetching   an index on object storage without the vectors that are not needed
    shards     `ShardedIndex`, which asks others for what is in their cells
"""

from __future__ import annotations

from hedwig.index.exact import exact_search
from hedwig.index.files import INDEX_FILE, INDEX_FILES, ROWS_FILE, check_digest
from hedwig.index.geocell import GeocellIndex
from hedwig.index.references import References
from hedwig.index.shards import Found, IndexShard, Question, ShardedIndex, partition_cells

__all__ = [
    "INDEX_FILE",
    "INDEX_FILES",
    "ROWS_FILE",
    "Found",
    "GeocellIndex",
    "IndexShard",
    "Question",
    "References",
    "ShardedIndex",
    "check_digest",
    "exact_search",
    "partition_cells",
]
