"""The application on Ray Serve: encoder and index together in every replica, behind Serve's own HTTP proxy.

One deployment, because each hop between deployments costs 2 to 10 ms. Requests wait in the replica's gate, not in
Serve's queue: so a refusal is our JSON with Retry-After, and Serve's own limits, set a little higher, leave room for
the probes under full load. No `@serve.batch`: on a CPU a batch takes as long as its images one after another, waiting
for it costs latency, and an answer would depend on its neighbours in the batch in the last digits; on a GPU it is to
be measured first. No HAProxy, although it answers three times as many requests: with it Serve binds every interface.
Serve does not repeat a request whose replica died; `locate_remote` does.
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
from typing import Any

import ray
from ray import serve

from hedwig.serving.app import Locator, create_app
from hedwig.serving.limits import LOOPBACK_NAMES, Gate, Limits
from hedwig.storage import join, manifest_digest, read_manifest, resolve

__all__ = ["build", "describe_run", "start", "stop"]

_log = logging.getLogger(__name__)

_APPLICATION = "hedwig"
_NUM_PROBES = 8  # Serve slots that requests to be located cannot take
_STUCK_AFTER = 4.0  # times request_timeout_s; then the replica is replaced


class LocateReplica:
    """One replica: the loaded locator and the application around it.

    Args:
        run: Run folder.
        load: Makes the locator from the run folder; `Hedwig.load` when None.
        device: Of the real locator, "cpu" or "cuda".
        limits: What a request may cost.
        allowed_hosts: Names accepted in the Host header.
        num_threads_torch: Threads of torch and faiss in this process.
    """

    def __init__(
        self,
        run: str,
        load: Callable[[str], Locator] | None,
        device: str,
        limits: Limits,
        allowed_hosts: Collection[str],
        num_threads_torch: int,
    ) -> None:
        # The whole replica is built before Serve sends it anything, so it is never ready without its index.
        self._locator = load(run) if load is not None else _load(run, device, num_threads_torch)
        self._info = describe_run(run, self._locator)
        self._limits = limits
        self._allowed_hosts = tuple(allowed_hosts)
        self._gate = Gate(limits)

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(
            self._locator,
            limits=self._limits,
            allowed_hosts=self._allowed_hosts,
            info=self._info,
            gate=self._gate,
        )

    async def check_health(self) -> None:
        """Raise when work has hung, which nothing but a new process cures; Serve then replaces the replica."""
        limit_s = _STUCK_AFTER * self._limits.request_timeout_s
        if self._gate.oldest_s() > limit_s:
            raise RuntimeError(f"one image has been worked on for more than {limit_s:g} s")


def build(
    run: str,
    *,
    num_replicas: int = 1,
    max_ongoing_requests: int = 8,
    max_queued_requests: int = 64,
    request_timeout_s: float = 30.0,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    num_threads: int = 1,
    max_body_bytes: int = 25 * 1024**2,
    body_timeout_s: float = 10.0,
    allowed_hosts: Collection[str] = LOOPBACK_NAMES,
    load: Callable[[str], Locator] | None = None,
) -> Any:
    """The Serve application for one run.

    Args:
        run: Run folder; on object storage or a shared disk when there are several nodes.
        num_replicas: Processes, each with its own model and index.
        max_ongoing_requests: Bodies that one replica holds at once.
        max_queued_requests: Requests that may wait for that, per replica; one more is answered 503.
        request_timeout_s: For waiting plus locating.
        num_cpus: Reserved per replica; rounded down (at least 1) also the threads of torch and faiss.
        num_gpus: Reserved per replica.
        num_threads: Images that one replica locates at the same time.
        max_body_bytes: Largest body.
        body_timeout_s: A body that has not arrived whole after this is refused.
        allowed_hosts: Names accepted in the Host header; ``("*",)`` accepts all.
        load: Makes the locator from `run`; `Hedwig.load` when None.

    Returns:
        What `ray.serve.run` takes.
    """
    limits = Limits(
        max_body_bytes=max_body_bytes,
        body_timeout_s=body_timeout_s,
        request_timeout_s=request_timeout_s,
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=max_queued_requests,
        num_threads=num_threads,
    )
    deployment = serve.deployment(
        name="locate",
        num_replicas=num_replicas,
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
    return deployment.bind(resolve(run), load, device, limits, tuple(allowed_hosts), max(1, int(num_cpus)))


def start(
    run: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    insecure: bool = False,
    ready_timeout_s: float = 300.0,
    request_timeout_s: float = 30.0,
    **options: Any,
) -> str:
    """Serve one run over HTTP and return when it is ready.

    Starts a local Ray when none is initialised. Images and answers travel in clear text and nobody is asked who they
    are, so a host other than loopback is refused unless `insecure`.

    Args:
        run: Run folder.
        host: Address to listen on.
        port: Port to listen on.
        insecure: Allow any `host`, and any name in the Host header.
        ready_timeout_s: Give up when the service is not ready after this.
        request_timeout_s: For waiting plus locating.
        **options: Of `build`.

    Returns:
        The base URL, without a slash at the end.

    Raises:
        ValueError: `host` is not loopback and `insecure` is false.
        RuntimeError: the port is taken, Serve already runs, the CPUs or GPUs are not there, or the replica could not
            be started.
        TimeoutError: not ready in time.
    """
    loopback = _is_loopback(host)
    if not (loopback or insecure):
        raise ValueError(
            f"host is {host!r}, which other machines reach, and this service has neither encryption nor keys; use "
            "127.0.0.1 behind a proxy that has both, or pass insecure=True."
        )
    if loopback and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") == "1":
        raise ValueError("RAY_SERVE_ENABLE_HA_PROXY=1 makes Serve bind every interface; unset it to serve on loopback.")
    if not loopback:
        options.setdefault("allowed_hosts", ("*",))
    application = build(run, request_timeout_s=request_timeout_s, **options)
    _ensure_ray(options)
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
        serve.run(application, name=_APPLICATION, route_prefix="/")
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
    if ray_too:
        ray.shutdown()


def describe_run(run: str, locator: object = None) -> dict[str, Any]:
    """What ``/v1/info`` says: counts from the run's manifests, model from the encoder that was loaded.

    Args:
        run: Run folder.
        locator: `Hedwig`; anything without an encoder says nothing about the model.

    Returns:
        ``num_references``, ``num_cells``, ``run_digest``, ``model``, ``weights``: those that are known.
    """
    found: dict[str, Any] = {}
    index = read_manifest(join(run, "index"))
    if index is not None:
        found |= {"num_references": index.num_out, "run_digest": manifest_digest(join(run, "index"))}
    geocells = read_manifest(join(run, "geocells"))
    if geocells is not None and "num_cells" in geocells.details:
        found["num_cells"] = geocells.details["num_cells"]
    encoder = getattr(getattr(locator, "embedder", None), "encoder", None)
    if encoder is not None:
        found |= {"model": encoder.model_id, "weights": encoder.weights_note}
    return found


def _load(run: str, device: str, num_threads: int) -> Locator:
    """The real locator, with the threads of torch and faiss set: both default to every core of the machine."""
    import faiss
    import torch

    from hedwig.retrieve import Hedwig

    torch.set_num_threads(num_threads)
    faiss.omp_set_num_threads(num_threads)
    return Hedwig.load(run, device=device)


def _ensure_ray(options: Mapping[str, Any]) -> None:
    """A local Ray if none is there, and a refusal instead of a wait for CPUs or GPUs that will never come."""
    replicas = options.get("num_replicas", 1)
    need = {"CPU": replicas * options.get("num_cpus", 1.0), "GPU": replicas * options.get("num_gpus", 0.0)}
    if not ray.is_initialized():
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15, Ray's default, starves replicas beside other programs
        num_cpus = max(os.cpu_count() or 1, math.ceil(need["CPU"]))
        # "local": never join a cluster that happens to run on this machine.
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    have = ray.cluster_resources()
    for name, amount in need.items():
        if amount > have.get(name, 0.0):
            raise RuntimeError(
                f"{replicas} replicas need {amount:g} {name}s and this Ray has {have.get(name, 0.0):g}; ask for fewer "
                "replicas or less per replica."
            )


def _is_loopback(host: str) -> bool:
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
