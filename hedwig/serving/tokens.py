"""Ray's own token: whoever reaches a Ray without one runs code on it, so every Ray that hedwig starts asks for it.

Ray 2.60 turns tokens on for what `ray.init` starts unless RAY_AUTH_MODE says otherwise, and makes a token file that
everybody on the machine may read. Here the file is made first, for its owner alone. `ray start` decides by the
environment: cluster_configs/ and docker/ set RAY_AUTH_MODE=token. The token travels in clear: it keeps out who can
connect, not who can listen. Serve's HTTP port does not ask for it; that is what API keys are for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
from pathlib import Path

__all__ = ["ensure_token", "tokens_off"]

_log = logging.getLogger(__name__)

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def tokens_off() -> bool:
    """Whether somebody has turned tokens off in this environment."""
    return os.environ.get(_MODE, "token").strip().lower() != "token"


def ensure_token() -> None:
    """Call before `ray.init`: a token exists, in a file that nobody else may read; an existing one is kept.

    Raises:
        FileNotFoundError: RAY_AUTH_TOKEN_PATH names a file that is not there.
    """
    if tokens_off():
        _log.warning("%s=%s: this Ray runs code for whoever can connect to it", _MODE, os.environ[_MODE])
        return
    if os.environ.get(_TOKEN):
        return
    if named := os.environ.get(_PATH):
        if not Path(named).is_file():
            raise FileNotFoundError(
                f"{_PATH} names {named}, which is not there; make one: openssl rand -hex 32 > {named}"
            )
        return
    path = Path.home() / ".ray" / "auth_token"  # where Ray looks
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as token:
            token.write(secrets.token_hex(32))
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        os.chmod(path, 0o600)
