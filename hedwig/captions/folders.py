"""The folder of a model that runs here: that it is one, and which weights are in it.

A caption belongs to the very weights that wrote it, so their digest goes into the fingerprint of the captions and into
the keys of kept answers. For a model that `hedwig fetch` brought, the digests are written down in its folder;
otherwise every file is read, which takes seconds for large ones. Nothing is loaded, and no code of the folder is run.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

__all__ = ["model_folder", "weights_digest"]

SOURCE = "source.json"  # of `hedwig fetch`, see hedwig.models.fetched
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def model_folder(model: str | Path) -> Path:
    """The folder itself.

    Raises:
        FileNotFoundError: it is not there, or holds no model.
    """
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{str(model)!r} holds no model (config.json and *.safetensors); give the folder of a downloaded one, or a "
            "name that `hedwig fetch` knows."
        )
    return folder.resolve()


def weights_digest(folder: Path) -> str:
    """Twelve hex digits over names, sizes and sha256 of the weights, the configuration and the tokenizer's files."""
    paths = sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.name != SOURCE})
    known = _recorded(folder)
    total = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest = known.get((path.name, size))
        if digest is None:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name} {size} {digest}\n".encode())
    return total.hexdigest()[:12]


def _recorded(folder: Path) -> dict[tuple[str, int], str]:
    """sha256 by name and size, as written down when the model was fetched."""
    try:
        files = json.loads((folder / SOURCE).read_text(encoding="utf-8"))["files"]
        return {(one["path"], one["size"]): one["sha256"] for one in files}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
