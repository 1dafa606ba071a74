"""Versions of a run, the pointer that publishes one of them, what may be thrown away, and tables in fewer files.

`hedwig.publishing.pointer` knows the versions and the pointer, `hedwig.publishing.garbage` what nothing refers to, and
`hedwig.publishing.compaction` rewrites a table without making it another one.
"""

from __future__ import annotations

from hedwig.publishing.compaction import Compaction, compact
from hedwig.publishing.garbage import Garbage, collect_garbage, find_garbage
from hedwig.publishing.pointer import (
    POINTER,
    VERSIONS,
    Pointer,
    Publication,
    growing_version,
    list_versions,
    pointer_token,
    publish,
    published_folder,
    read_pointer,
    rollback,
    version_folder,
    write_pointer,
)

__all__ = [
    "POINTER",
    "VERSIONS",
    "Compaction",
    "Garbage",
    "Pointer",
    "Publication",
    "collect_garbage",
    "compact",
    "find_garbage",
    "growing_version",
    "list_versions",
    "pointer_token",
    "publish",
    "published_folder",
    "read_pointer",
    "rollback",
    "version_folder",
    "write_pointer",
]
