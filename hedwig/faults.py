"""Object storage that fails now and then: temporary faults are tried again with growing pauses, and counted.

Two layers. pyarrow's S3 client tries each request `max_attempts` times, which also holds inside Ray's readers, writers
and checkpoints, where nothing of ours can count. What comes through, and every fault of reading a single object, is
tried again by `retried`. Temporary are 408, 429 and 5xx, SlowDown and its kin, time-outs, broken connections and bodies
shorter than they said; a missing key, a refused one or a wrong name is not.

How storage is reached stands in the environment, so that it holds for both libraries and for every process of a job:
the variables of the AWS tools (``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``, ``AWS_REGION`` or
``AWS_DEFAULT_REGION``, ``AWS_MAX_ATTEMPTS``) and ``HEDWIG_ANONYMOUS``: ``1`` signs no request, and a list such as
``s3://open-data,gs://tiles`` none to these buckets. `storage_variables` is where settings become variables. Credentials
come from the standard chains of AWS and Google and are never read here.
"""

from __future__ import annotations

import copyreg
import functools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import pyarrow.fs

__all__ = [
    "ATTEMPTS",
    "VARIABLES",
    "is_anonymous",
    "is_temporary",
    "max_attempts",
    "num_retries",
    "open_options",
    "read_s3",
    "remote_filesystem",
    "retried",
    "storage_variables",
]

logger = logging.getLogger(__name__)
ATTEMPTS = 8  # where AWS_MAX_ATTEMPTS does not say
ANONYMOUS = "HEDWIG_ANONYMOUS"
VARIABLES = (
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_MAX_ATTEMPTS",
    "AWS_REQUEST_CHECKSUM_CALCULATION", ANONYMOUS,
)  # fmt: skip
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


def storage_variables(
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    anonymous: bool | Sequence[str] | None = None,
    max_attempts: int | None = None,
) -> dict[str, str]:
    """The environment variables that say this; what is None is left as the environment has it.

    Args:
        endpoint_url: of an S3 service that is not AWS's.
        region: of S3.
        anonymous: sign no request at all, or none to these buckets, e.g. ``s3://open-data``.
        max_attempts: how often a request is tried in all, from 1.

    Raises:
        ValueError: an endpoint that is no http(s) address or holds a password, a bucket without its scheme, or no
            attempt at all.
    """
    variables: dict[str, str] = {}
    if endpoint_url is not None:
        if not re.fullmatch(r"https?://[^\s@?#]+", endpoint_url):
            shown = re.sub(r"//[^/]*@", "//***@", endpoint_url)
            raise ValueError(
                f"endpoint_url is {shown!r}; it must look like https://host:port. Credentials belong into the "
                "environment or ~/.aws/credentials."
            )
        variables["AWS_ENDPOINT_URL_S3"] = endpoint_url
    if region is not None:
        variables |= {"AWS_REGION": region, "AWS_DEFAULT_REGION": region}  # boto3 reads the second alone
    if isinstance(anonymous, bool):
        variables[ANONYMOUS] = "1" if anonymous else "0"
    elif anonymous is not None:
        wrong = [bucket for bucket in anonymous if not re.fullmatch(r"(s3|gs)://[^/,\s]+/?", bucket)]
        if wrong:
            raise ValueError(f"anonymous names {wrong[0]!r}; a bucket is written s3://NAME or gs://NAME.")
        variables[ANONYMOUS] = ",".join(anonymous)
    if max_attempts is not None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts is {max_attempts}; the first one counts, so it is at least 1.")
        variables["AWS_MAX_ATTEMPTS"] = str(max_attempts)
    return variables


def max_attempts() -> int:
    """How often a request is tried in all: ``AWS_MAX_ATTEMPTS``, else `ATTEMPTS`.

    Raises:
        ValueError: the variable is no number from 1.
    """
    text = os.environ.get("AWS_MAX_ATTEMPTS") or str(ATTEMPTS)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"AWS_MAX_ATTEMPTS is {text!r}; it must be a whole number from 1.")
    return int(text)


def is_anonymous(uri: str) -> bool:
    """Whether requests for `uri` are not signed."""
    text = os.environ.get(ANONYMOUS, "").strip()
    if text.lower() in ("", "0", "false", "no"):
        return False
    if text.lower() in ("1", "true", "yes", "*"):
        return True
    bucket = "/".join(uri.split("/")[:3])
    return bucket in {one.strip().rstrip("/") for one in text.split(",")}


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
    """Try `function`, which must be one that may be done twice, up to `max_attempts` times while faults last."""

    @functools.wraps(function)
    def trying(*args: P.args, **kwargs: P.kwargs) -> T:
        global _count
        attempts = max_attempts()
        for attempt in range(1, attempts):
            try:
                return function(*args, **kwargs)
            except OSError as error:
                if not is_temporary(error):
                    raise
                with _lock:
                    _count += 1
                pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1.0)  # noqa: S311
                logger.info("storage: %s; attempt %d of %d in %.1f s", error, attempt + 1, attempts, pause_s)
                time.sleep(pause_s)
        return function(*args, **kwargs)

    return trying


def remote_filesystem(uri: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a URI and the path inside it; on S3 one that is patient, in other processes too.

    A URI that carries options itself (``?endpoint_override=``) is taken as it is.
    """
    if "?" not in uri and uri.startswith("s3://"):
        endpoint, anonymous = _endpoint(), is_anonymous(uri)
        region = _region() or _found_region(uri.split("/")[2], endpoint)
        return _patient_s3(region, endpoint, anonymous, max_attempts()), uri.removeprefix("s3://").rstrip("/")
    if "?" not in uri and uri.startswith("gs://") and is_anonymous(uri):
        return _anonymous_gcs(), uri.removeprefix("gs://").rstrip("/")
    fs, inner = pyarrow.fs.FileSystem.from_uri(uri)
    return fs, str(inner)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


@functools.cache
def _found_region(bucket: str, endpoint: str | None) -> str:
    # A store of one's own has no regions.
    return "us-east-1" if endpoint else str(pyarrow.fs.resolve_s3_region(bucket))


@functools.cache
def _patient_s3(region: str, endpoint: str | None, anonymous: bool, attempts: int) -> Any:
    copyreg.pickle(pyarrow.fs.S3FileSystem, _reduce_s3)
    return pyarrow.fs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
        anonymous=anonymous,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )


def _reduce_s3(fs: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """How to pickle one: pyarrow keeps all but the retry strategy, and the usual one tries three times at most."""
    return _patient_again, (fs.__reduce__()[1][0], max_attempts())


def _patient_again(settings: Mapping[str, Any], attempts: int) -> Any:
    patience = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=attempts)
    return pyarrow.fs.S3FileSystem(**settings, retry_strategy=patience)


@functools.cache
def _anonymous_gcs() -> Any:
    return pyarrow.fs.GcsFileSystem(anonymous=True)


def open_options(uri: str) -> dict[str, Any]:
    """What smart_open needs to read one object: a client that signs nothing, where that is asked for."""
    if not (uri.startswith("gs://") and is_anonymous(uri)):
        return {}
    import google.cloud.storage  # type: ignore[import-untyped,unused-ignore]

    return {"client": google.cloud.storage.Client.create_anonymous_client()}


def read_s3(uri: str) -> bytes:
    """The bytes of one object, in one request without retries: whoever calls this counts them.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: the storage failed; the message names the address.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    with _lock:
        client = _boto_client(_endpoint(), _region(), is_anonymous(uri))
    try:
        return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    except Exception as error:  # botocore's and urllib3's have no builtin ancestor in common
        code = (getattr(error, "response", None) or {}).get("Error", {}).get("Code")
        if code in ("NoSuchKey", "404"):
            raise FileNotFoundError(f"no image file at {uri}") from error
        raise OSError(f"cannot read {uri}: {type(error).__name__}: {error}") from error


@functools.cache
def _boto_client(endpoint: str | None, region: str | None, anonymous: bool) -> Any:
    import boto3
    import botocore
    from botocore.config import Config

    options: dict[str, Any] = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": REQUEST_TIMEOUT_S}
    if anonymous:
        options["signature_version"] = botocore.UNSIGNED
    config = Config(retries={"total_max_attempts": 1}, max_pool_connections=64, **options)
    return boto3.session.Session().client("s3", endpoint_url=endpoint, region_name=region, config=config)
