"""Object storage that fails now and then: temporary faults are tried again with growing pauses, and counted.

Two layers. pyarrow's S3 client tries each request `ATTEMPTS` times, which also holds inside Ray's readers, writers and
checkpoints, where nothing of ours can count. What comes through, and every fault of reading a single object, is tried
again by `retried`. Temporary are 408, 429 and 5xx, SlowDown and its kin, time-outs, broken connections and bodies
shorter than they said; a missing key, a refused one or a wrong name is not.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import pyarrow.fs

__all__ = ["ATTEMPTS", "is_temporary", "num_retries", "read_s3", "remote_filesystem", "retried"]

logger = logging.getLogger(__name__)
ATTEMPTS = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S = 10.0, 30.0
_TEMPORARY = re.compile(
    r"HTTP status (408|429|5\d\d)|\((408|429|5\d\d)\)|SLOW_?DOWN|INTERNAL_?(FAILURE|ERROR)|SERVICE_?UNAVAILABLE"
    r"|NETWORK_CONNECTION|REQUEST_?TIMEOUT|THROTTLING|curlCode|timed out|(Read|Connect) ?timeout"
    r"|IncompleteRead|total bytes expected"
    r"|connection (was )?(reset|broken|aborted|closed)|EndpointConnectionError|ResponseStreamingError|broken pipe",
    re.IGNORECASE,
)
_count = 0
_lock = threading.Lock()
P = ParamSpec("P")
T = TypeVar("T")


def num_retries() -> int:
    """How often this process tried again since it began."""
    return _count


def is_temporary(error: BaseException) -> bool:
    """Whether to try again: storage said so, or the line to it broke."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno is None and _TEMPORARY.search(str(error)) is not None


def retried(function: Callable[P, T]) -> Callable[P, T]:
    """Try `function`, which must be one that may be done twice, up to `ATTEMPTS` times while faults are temporary."""

    @functools.wraps(function)
    def trying(*args: P.args, **kwargs: P.kwargs) -> T:
        global _count
        for attempt in range(1, ATTEMPTS):
            try:
                return function(*args, **kwargs)
            except OSError as error:
                if not is_temporary(error):
                    raise
                with _lock:
                    _count += 1
                pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1.0)  # noqa: S311
                logger.info("storage: %s; attempt %d of %d in %.1f s", error, attempt + 1, ATTEMPTS, pause_s)
                time.sleep(pause_s)
        return function(*args, **kwargs)

    return trying


def remote_filesystem(uri: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a URI and the path inside it; on S3 one that is patient.

    Endpoint, region and credentials come from the ``AWS_*`` variables and files. A URI that carries options itself
    (``?endpoint_override=``) is taken as it is.
    """
    if not uri.startswith("s3://") or "?" in uri:
        fs, inner = pyarrow.fs.FileSystem.from_uri(uri)
        return fs, str(inner)
    endpoint = _endpoint()
    return _patient_s3(_region(uri.split("/")[2], endpoint), endpoint), uri.removeprefix("s3://").rstrip("/")


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@functools.cache
def _region(bucket: str, endpoint: str | None) -> str:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        if os.environ.get(name):
            return os.environ[name]
    if endpoint:
        return "us-east-1"  # a store of one's own has no regions
    return str(pyarrow.fs.resolve_s3_region(bucket))


@functools.cache
def _patient_s3(region: str, endpoint: str | None) -> Any:
    return pyarrow.fs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


def read_s3(uri: str) -> bytes:
    """The bytes of one object, in one request without retries: whoever calls this counts them.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: the storage failed; the message names the address.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    with _lock:
        client = _boto_client(_endpoint())
    try:
        return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    except Exception as error:  # botocore's and urllib3's have no builtin ancestor in common
        code = (getattr(error, "response", None) or {}).get("Error", {}).get("Code")
        if code in ("NoSuchKey", "404"):
            raise FileNotFoundError(f"no image file at {uri}") from error
        raise OSError(f"cannot read {uri}: {type(error).__name__}: {error}") from error


@functools.cache
def _boto_client(endpoint: str | None) -> Any:
    import boto3
    from botocore.config import Config

    patience = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": REQUEST_TIMEOUT_S}
    config = Config(retries={"total_max_attempts": 1}, max_pool_connections=64, **patience)
    return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
