"""The application on Ray Serve: replicas of `hedwig.serving.replica` behind one proxy.

One deployment unless `hedwig.serving.layout` says otherwise, because each hop costs 2 to 10 ms. Requests wait in the
replica's gate, not in Serve's queue: so a refusal is our JSON with Retry-After, and Serve's own limits, set a little
higher, leave room for the probes under full load. No `@serve.batch` in the replicas: on a CPU a batch takes as long as
its images one after another, waiting for it costs latency, and an answer would depend on its neighbours in the batch in
the last digits; an encoder apart, which is for a GPU, has it. On loopback and in a Ray that is started here the proxy
is HAProxy behind the fence of `hedwig.serving.fence`, where Ray brings one, else Serve's own. HAProxy answers several
times as many requests and repeats most of what a replica took with it when it died; Serve's own does not.
`hedwig.Client` repeats everything, behind either.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, Literal

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from hedwig.serving.beside import encoders, shards
from hedwig.serving.fence import FENCED_HOST, fenced_haproxy, haproxy_binary
from hedwig.serving.keys import KEYS_FILE_VARIABLE, KeyRing
from hedwig.serving.layout import Layout
from hedwig.serving.limits import LOOPBACK_NAMES, Limits
from hedwig.serving.rates import stop_rates
from hedwig.serving.releases import Locator
from hedwig.serving.replica import LocateReplica
from hedwig.serving.safety import Safety
from hedwig.serving.tokens import ensure_token
from hedwig.storage import resolve

__all__ = ["application", "build", "is_loopback", "needed", "start", "start_ray", "stop"]

_log = logging.getLogger(__name__)

_APPLICATION = "hedwig"
_NUM_PROBES = 8  # Serve slots that requests to be located cannot take

Proxy = Literal["auto", "python", "haproxy"]


def build(
    run: str,
    *,
    num_replicas: int = 1,
    max_replicas: int | None = None,
    upscale_delay_s: float = 10.0,
    downscale_delay_s: float = 600.0,
    max_ongoing_requests: int = 8,
    max_queued_requests: int = 64,
    request_timeout_s: float = 30.0,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    num_threads: int | None = None,
    max_body_bytes: int = 25 * 1024**2,
    body_timeout_s: float = 10.0,
    allowed_hosts: Collection[str] = LOOPBACK_NAMES,
    load: Callable[[str], Locator] | None = None,
    look_every_s: float = 2.0,
    **more: Any,
) -> Any:
    """The Serve application for one run.

    Args:
        run: Run folder; on object storage or a shared disk when there are several nodes.
        num_replicas: Processes, each with its own model and index.
        max_replicas: Grow to so many while the replicas have more than half their bodies in hand, and shrink again
            when they have less; None keeps to `num_replicas`.
        upscale_delay_s: How long they have more before one is added.
        downscale_delay_s: How long they have less before one is taken away, which takes long to load.
        max_ongoing_requests: Bodies that one replica holds at once.
        max_queued_requests: Requests that may wait for that, per replica; one more is answered 503.
        request_timeout_s: For waiting plus locating.
        num_cpus: Reserved per replica; rounded down (at least 1) also the threads of torch and faiss.
        num_gpus: Reserved per replica.
        num_threads: Images that one replica locates at the same time; None for 1, or where it waits for others while it
            does, for as many as it holds.
        max_body_bytes: Largest body.
        body_timeout_s: A body that has not arrived whole after this is refused.
        allowed_hosts: Names accepted in the Host header; ``("*",)`` accepts all.
        load: Makes the locator from the folder of a version; `Hedwig.load` when None.
        look_every_s: How often a replica looks for a newly published version.
        **more: Of `hedwig.serving.layout.Layout`, and of `hedwig.serving.safety.Safety`, whose ``keys`` are those of
            the environment.

    Returns:
        What `ray.serve.run` takes.

    Raises:
        ValueError: an option is out of range.
    """
    if max_replicas is not None and max_replicas < num_replicas:
        raise ValueError(f"max_replicas is {max_replicas}; it must be at least num_replicas={num_replicas}.")
    layout, safety = _split(more)
    if layout.encoder_apart and num_gpus > 0:
        raise ValueError(f"num_gpus is {num_gpus:g} and the encoder is apart: give the GPU to it by encoder_num_gpus.")
    safety.setdefault("keys", KeyRing.from_environment())
    safe = Safety(num_replicas=max_replicas or num_replicas, **safety)
    num_shards = layout.num_shards(run)
    waits = layout.encoder_apart or num_shards > 1
    limits = Limits(
        max_body_bytes=max_body_bytes,
        body_timeout_s=body_timeout_s,
        request_timeout_s=request_timeout_s,
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=max_queued_requests,
        num_threads=num_threads or (max_ongoing_requests if waits else 1),
    )
    deployment = serve.deployment(
        name="locate",
        **_number(num_replicas, max_replicas, max_ongoing_requests, upscale_delay_s, downscale_delay_s),
        max_ongoing_requests=max_ongoing_requests + max_queued_requests + _NUM_PROBES,
        max_queued_requests=max_queued_requests + _NUM_PROBES,
        backpressure_config={"status_code": 503, "retry_after_s": limits.retry_after_s},
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=request_timeout_s,
        max_constructor_retry_count=2,  # an unreadable run stays unreadable; Serve's default is 20
    )(serve.ingress()(LocateReplica))
    device = "cuda" if num_gpus > 0 else "cpu"
    num_threads_torch = max(1, int(num_cpus))
    return deployment.bind(
        resolve(run),
        load,
        device,
        limits,
        tuple(allowed_hosts),
        num_threads_torch,
        safe,
        look_every_s,
        encoder=encoders(run, layout, request_timeout_s),
        encoder_batch=layout.encoder_batch,
        shards=shards(run, layout, num_shards, num_threads_torch, request_timeout_s),
        num_decoders=num_threads_torch if waits and num_threads is None else None,
    )


def _split(more: Mapping[str, Any]) -> tuple[Layout, dict[str, Any]]:
    """The layout, and the rest of the options."""
    ours = {field.name for field in fields(Layout)}
    layout = Layout(**{name: value for name, value in more.items() if name in ours})
    return layout, {name: value for name, value in more.items() if name not in ours}


def _number(
    least: int, most: int | None, max_ongoing_requests: int, upscale_delay_s: float, downscale_delay_s: float
) -> dict[str, Any]:
    """How many replicas, as `serve.deployment` takes it."""
    if most is None or most == least:
        return {"num_replicas": least}
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            # Serve counts what waits in the gate too: below this nobody waits long, above it somebody soon will.
            "target_ongoing_requests": max(1.0, max_ongoing_requests / 2),
            "upscale_delay_s": upscale_delay_s,
            "downscale_delay_s": downscale_delay_s,
        }
    }


def application(arguments: dict[str, Any]) -> Any:
    """The application of a Serve config file (``import_path: hedwig.serving.deployment:application``).

    Args:
        arguments: The file's `args`: options of `build`, and ``insecure: true`` to ask nobody for a key. The keys are
            those in the environment of the cluster's nodes.

    Raises:
        ValueError: there are no API keys: what a cluster serves, other machines reach.
    """
    options = dict(arguments)
    insecure = options.pop("insecure", False)
    keys = KeyRing.from_environment()
    if not (keys or insecure):
        raise ValueError(
            f"The nodes have no API keys; make some with `hedwig keys new` and name their file in {KEYS_FILE_VARIABLE} "
            "on every node, or set insecure: true where something in front asks for them."
        )
    return build(**options, keys=keys)


def start(
    run: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    insecure: bool = False,
    proxy: Proxy = "auto",
    ready_timeout_s: float = 300.0,
    request_timeout_s: float = 30.0,
    **options: Any,
) -> str:
    """Serve what is published of one run over HTTP and return when it is ready.

    Starts a local Ray when none is initialised. The API keys of the environment are asked for; where there are none, a
    host other than loopback is refused unless `insecure`. Images, answers and keys travel in clear text.

    Args:
        run: Run folder.
        host: Address to listen on.
        port: Port to listen on.
        insecure: Allow any `host` without keys.
        proxy: See `start_ray`; a Ray that runs already has chosen.
        ready_timeout_s: Give up when the service is not ready after this.
        request_timeout_s: For waiting plus locating.
        **options: Of `build`.

    Returns:
        The base URL, without a slash at the end.

    Raises:
        ValueError: `host` is not loopback, there are no keys and `insecure` is false; or the keys cannot be read.
        RuntimeError: the port is taken, Serve already runs, the CPUs or GPUs are not there, or the replica could not
            be started.
        TimeoutError: not ready in time.
    """
    loopback = is_loopback(host)
    keys = options.setdefault("keys", KeyRing.from_environment())
    if not (loopback or insecure or keys):
        raise ValueError(
            f"host is {host!r}, which other machines reach, and there are no API keys; make some with `hedwig keys "
            f"new` and name their file in {KEYS_FILE_VARIABLE}, use 127.0.0.1, or pass insecure=True (--insecure)."
        )
    if loopback and keys is None:
        options["rate_per_s"] = 0.0  # there is nobody to hold back but oneself
    if loopback and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") == "1":
        raise ValueError(
            "RAY_SERVE_ENABLE_HA_PROXY=1 makes Serve bind every interface; unset it to serve on loopback: --proxy "
            "haproxy turns it on behind a fence."
        )
    host = FENCED_HOST if host == "localhost" else host
    if not loopback:
        options.setdefault("allowed_hosts", ("*",))
    application = build(run, request_timeout_s=request_timeout_s, **options)
    if not ray.is_initialized():
        start_ray(host, proxy, num_cpus=needed(run, options)["CPU"])
    _check_room(run, options)
    if serve.status().proxies:
        raise RuntimeError(
            "Ray Serve already runs here and cannot change its address; call hedwig.serving.stop() first."
        )
    _check_port(host, port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # this process's copy of what Serve's own files hold
    serve.start(
        proxy_location="HeadOnly",
        # Above the replica's own limits, which answer in JSON; a caller can lift this one with a header, not those.
        http_options={"host": host, "port": port, "request_timeout_s": 2 * request_timeout_s + 15.0},
    )
    try:
        serve.run(
            application,
            name=_APPLICATION,
            route_prefix="/",
            # Without a line for every request, which takes a tenth of a replica; who asked what is for `AuditLog`.
            logging_config=LoggingConfig(log_level="WARNING"),
        )
    except RuntimeError as error:
        reason = _failure() or str(error)
        stop()
        raise RuntimeError(f"The replica for run {run!r} could not be started: {reason}") from None
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    _wait_ready(url, ready_timeout_s)
    _log.info("serving %s at %s", run, url)
    return url


def stop(*, ray_too: bool = False) -> None:
    """End the service, and with `ray_too` the local Ray as well."""
    serve.shutdown()
    if ray.is_initialized():
        stop_rates()
    if ray_too:
        ray.shutdown()


def start_ray(host: str = FENCED_HOST, proxy: Proxy = "auto", *, num_cpus: float = 1.0) -> None:
    """Start a local Ray for a service.

    Args:
        host: Where the service will listen.
        proxy: "haproxy", fenced, which needs `host` 127.0.0.1; "python" for Serve's own; "auto" takes the first that
            there is.
        num_cpus: Logical CPUs that are needed at least.

    Raises:
        ValueError: "haproxy", which is not there or cannot be fenced.
    """
    binary = _chosen_haproxy(host, proxy)
    ensure_token()
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15, Ray's default, starves replicas beside other programs
    # Of this Ray nobody reads the metrics (ours are /metrics), and its agent takes 0.1 s in one go to sum them up.
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    with fenced_haproxy(binary) if binary is not None else nullcontext():
        # "local": never join a cluster that happens to run on this machine.
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(num_cpus)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def _chosen_haproxy(host: str, proxy: Proxy) -> str | None:
    """The path of the HAProxy to use; None for Serve's own proxy."""
    binary = haproxy_binary() if proxy != "python" and host in (FENCED_HOST, "localhost") else None
    if proxy == "haproxy" and binary is None:
        raise ValueError(
            f"proxy is 'haproxy', host {host!r}: HAProxy is used on {FENCED_HOST} only, and where Ray brings it "
            "(Linux, ray[serve]); choose proxy: python."
        )
    return binary


def needed(run: str, options: Mapping[str, Any], *, most: bool = False) -> dict[str, float]:
    """The CPUs and GPUs that a service of `run` reserves.

    Args:
        run: Run folder.
        options: Of `build`.
        most: With as many replicas as there may ever be, instead of those at the start.
    """
    layout = _split(options)[0]
    beside = layout.needed(layout.num_shards(run))
    replicas = (options.get("max_replicas") if most else None) or options.get("num_replicas", 1)
    return {
        "CPU": replicas * options.get("num_cpus", 1.0) + beside["CPU"],
        "GPU": replicas * options.get("num_gpus", 0.0) + beside["GPU"],
    }


def _check_room(run: str, options: Mapping[str, Any]) -> None:
    """A refusal instead of a wait for CPUs or GPUs that will never come."""
    have = ray.cluster_resources()
    for name, amount in needed(run, options).items():
        if amount > have.get(name, 0.0):
            layout = _split(options)[0]
            others = ", with encoders and shards," if layout.encoder_apart or layout.num_shards(run) > 1 else ""
            raise RuntimeError(
                f"{options.get('num_replicas', 1)} replicas{others} need {amount:g} {name}s and this Ray has "
                f"{have.get(name, 0.0):g}; ask for fewer replicas or less per replica."
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RuntimeError(f"Cannot listen on {host}:{port} ({error.strerror}); choose another port.") from None


def _wait_ready(url: str, timeout_s: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + timeout_s
    seen = "no answer"
    while time.monotonic() < deadline:
        try:
            with opener.open(f"{url}/readyz", timeout=5.0):
                return
        except OSError as error:
            seen = str(error)
        time.sleep(0.2)
    raise TimeoutError(f"{url}/readyz was not ready after {timeout_s:g} s ({seen}); look at the replica's log.")


def _failure() -> str:
    """Why the deployment failed: the last line of what Serve tells, which is a whole traceback."""
    application = serve.status().applications.get(_APPLICATION)
    deployments = application.deployments.values() if application else ()
    message = next((d.message for d in deployments if d.message), "")
    _log.error("%s", message)
    return next((line.strip() for line in reversed(message.splitlines()) if line.strip()), "")
