"""The files of a batch job: shards of requests, an index beside each, and what is known about their batches.

A round is a folder ``round-000`` of ``requests-00000.jsonl`` (the very bytes that are uploaded), ``index-00000.jsonl``
(per line: custom_id, key, pano_id, content_hash, num_frames), ``written.json``, written last (with the digest of what
is asked, and where), and ``batches.json``, rewritten atomically whenever the endpoint told something. A round without
``written.json`` was never handed in.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hedwig import storage

__all__ = ["Round", "write_round"]


class Round:
    """One written round.

    Args:
        folder: ``round-NNN``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        written = json.loads((folder / "written.json").read_text())
        self.shards: list[str] = written["shards"]
        self.job: str = written["job"]
        self.digest: str | None = written.get("dialogue")
        self.endpoint: str | None = written.get("endpoint")
        self._noted = folder / "batches.json"
        self._states: dict[str, dict[str, Any]] = json.loads(self._noted.read_text()) if self._noted.exists() else {}

    def state(self, shard: str) -> dict[str, Any]:
        """What is known about a shard: file_id, batch_id, status, errors, failures, collected."""
        return self._states.get(shard, {})

    def note(self, shard: str, **news: Any) -> None:
        """Write down what the endpoint said, before anything else is done."""
        self._states[shard] = {**self.state(shard), **news}
        storage.write_bytes(str(self._noted), json.dumps(self._states, indent=1).encode())

    @property
    def is_collected(self) -> bool:
        """Whether all its batches have ended and their answers are kept."""
        return all(self.state(shard).get("collected") for shard in self.shards)

    def failures(self) -> dict[str, dict[str, Any]]:
        """By custom_id: status, trouble, and whether it is final."""
        return {name: one for shard in self.shards for name, one in self.state(shard).get("failures", {}).items()}

    def entries(self, shard: str) -> Iterator[dict[str, Any]]:
        """The index of a shard."""
        with open(self.folder / shard.replace("requests-", "index-"), "rb") as stream:
            yield from map(json.loads, stream)

    def num_requests(self, shard: str) -> int:
        """How many there are in a shard."""
        return sum(1 for _ in self.entries(shard))

    def lines(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Index entry and request line of every request, as a stream."""
        for shard in self.shards:
            with open(self.folder / shard, "rb") as stream:
                yield from zip(self.entries(shard), stream, strict=True)

    def drop_requests(self) -> None:
        """Delete the request lines, gigabytes of pictures, once nothing of them is needed any more."""
        for shard in self.shards:
            (self.folder / shard).unlink(missing_ok=True)


def write_round(
    folder: Path,
    requests: Iterator[tuple[dict[str, Any], bytes]],
    *,
    max_requests: int,
    max_bytes: int,
    digest: str | None = None,
    endpoint: str | None = None,
) -> Round | None:
    """Stream requests into shards of at most so many lines and bytes; None where there are none.

    `digest` and `endpoint` are written down with them: of what is asked, and where.

    Raises:
        ValueError: one request alone is larger than a shard, or two have the same custom_id.
    """
    shards: list[str] = []
    names: set[str] = set()
    lines: IO[bytes] | None = None
    index: IO[bytes] | None = None
    count = size = 0
    try:
        for entry, line in requests:
            if len(line) > max_bytes:
                raise ValueError(
                    f"The request of {entry['pano_id']!r} is {len(line)} bytes long and a shard holds {max_bytes}; "
                    "show fewer frames (captions.max_frames) or one sheet (captions.images)."
                )
            if entry["custom_id"] in names:
                raise ValueError(f"Two requests are called {entry['custom_id']!r}; pano_id must be unique.")
            names.add(entry["custom_id"])
            if lines is None or index is None or count == max_requests or size + len(line) > max_bytes:
                _close(lines, index)
                folder.mkdir(parents=True, exist_ok=True)
                shard = f"requests-{len(shards):05d}.jsonl"
                lines = open(folder / shard, "wb")  # noqa: SIM115
                index = open(folder / shard.replace("requests-", "index-"), "wb")  # noqa: SIM115
                shards.append(shard)
                count = size = 0
            lines.write(line)
            index.write(json.dumps(entry).encode() + b"\n")
            count, size = count + 1, size + len(line)
    finally:
        _close(lines, index)
    if not shards:
        return None
    written = {"shards": shards, "num_requests": len(names), "job": uuid.uuid4().hex[:12]}
    written |= {"dialogue": digest, "endpoint": endpoint}
    storage.write_bytes(str(folder / "written.json"), json.dumps(written).encode())
    return Round(folder)


def _close(*streams: IO[bytes] | None) -> None:
    for stream in streams:
        if stream is not None:
            stream.close()
