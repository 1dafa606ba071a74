"""Where artefacts live: a folder with ``manifest.json``, written last, on a local disk, s3:// or gs://.

A folder without a manifest is unfinished work and never read as a result. The manifest carries a *fingerprint* (what
was asked: kind, settings, inputs) and the digests of its files (what came out): a stage whose fingerprint is already
there has nothing to do. Tables go through pyarrow filesystems, single images through boto3 or smart_open; how they are
reached is told by the environment (`hedwig.faults`), and credentials are never read or stored here. Files are written
under a temporary name and renamed, so that no reader ever sees half of one.
"""

from __future__ import annotations

from hedwig.storage.files import (
    copy_file,
    delete,
    exists,
    filesystem,
    is_folder,
    is_remote,
    join,
    list_files,
    local_copy,
    read_bytes,
    resolve,
    sha256_of,
    write_bytes,
    writing,
)
from hedwig.storage.manifests import (
    MANIFEST,
    Manifest,
    clone,
    fingerprint,
    manifest_digest,
    publish,
    read_manifest,
    write_manifest,
)
from hedwig.storage.tables import (
    open_table,
    read_table,
    table_files,
    write_parquet,
    write_table,
)

__all__ = [
    "MANIFEST",
    "Manifest",
    "clone",
    "copy_file",
    "delete",
    "exists",
    "filesystem",
    "fingerprint",
    "is_folder",
    "is_remote",
    "join",
    "list_files",
    "local_copy",
    "manifest_digest",
    "open_table",
    "publish",
    "read_bytes",
    "read_manifest",
    "read_table",
    "resolve",
    "sha256_of",
    "table_files",
    "write_bytes",
    "write_manifest",
    "write_parquet",
    "write_table",
    "writing",
]
