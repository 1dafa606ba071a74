"""Commands around the pipeline: a synthetic world, frames to look at, the state of the machine, the settings."""

from __future__ import annotations

import importlib.metadata
import ipaddress
import json
import os
import platform
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from hedwig.cli.console import Progress, set_up, show

__all__ = ["register", "versions_text"]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
_PACKAGES = ("ray", "torch", "open_clip_torch", "faiss-cpu", "llvmlite", "numpy", "pyarrow", "Pillow", "simplejpeg")
_RAY_PORTS = {6379: "GCS", 8265: "dashboard and job API", 10001: "client server"}
config_app = typer.Typer(no_args_is_help=True, help="Show an experiment as it would run, or the schema of the file.")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("synth", rich_help_panel="Tools")(synth)
    app.command("slice", rich_help_panel="Tools")(slice_)
    app.command("doctor", rich_help_panel="Tools")(doctor)
    app.add_typer(config_app, name="config", rich_help_panel="Tools")


def versions_text() -> str:
    """hedwig, Python and the packages that decide numbers and formats, one line each."""
    lines = [f"hedwig {importlib.metadata.version('hedwig')}", f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed")
    from hedwig.schema import SCHEMA_VERSION

    return "\n".join([*lines, f"table format {SCHEMA_VERSION}"])


def synth(
    out: Annotated[Path, typer.Option("--out", help="Folder of the world.")],
    num: Annotated[int, typer.Option("--num", min=1, help="Number of panoramas.")] = 1000,
    width: Annotated[int, typer.Option("--width", min=64, help="Width in px; the height is half of it.")] = 1024,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the world.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Render a synthetic world of panoramas at real coordinates.  Writes images/ and panoramas.csv.

    Example: hedwig synth --num 500 --width 1024 --seed 1 --out runs/world
    """
    set_up(quiet=quiet, as_json=as_json)
    if width % 2:
        raise typer.BadParameter(f"--width {width} must be even: the height is half of it")
    from hedwig import storage
    from hedwig.config import ClusterConfig, SyntheticConfig
    from hedwig.pipelines import ray_running, render_world

    section = SyntheticConfig(num=num, width=width, seed=seed)
    with ray_running(ClusterConfig()), Progress() as progress:
        manifest = render_world(storage.resolve(str(out)), section, lambda done, total: progress("synth", done, total))
    listing = str(out / "panoramas.csv")
    result = {"listing": listing, "num_panoramas": manifest.num_out, "seconds": manifest.seconds}
    show(result, f"{manifest.num_out} synthetic panoramas in {manifest.seconds:.1f} s: {listing}")


def slice_(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE|LISTING...", help="Panoramas, or listings of them.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the frames.")],
    mode: Annotated[str, typer.Option(help="paper, wrap, perspective or bearings")] = "wrap",
    num_frames: Annotated[int, typer.Option("--frames", min=1, max=64, help="Frames per panorama.")] = 8,
    frame_px: Annotated[int, typer.Option("--frame-px", min=16, help="Side of a frame in px.")] = 224,
    select: Annotated[str, typer.Option(help="uniform, middle or first")] = "uniform",
    fov_deg: Annotated[float, typer.Option("--fov", help="Field of view in degrees (perspective).")] = 90.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Cut panoramas into frames and write them side by side, one JPEG per panorama, to look at.

    Example: hedwig slice panorama.jpg --mode perspective --frames 4 --out frames/
    """
    set_up(quiet=quiet, as_json=as_json)
    import numpy as np
    from PIL import Image

    from hedwig import storage
    from hedwig.panorama import PanoramaSlicer, Slicing
    from hedwig.sources import ImageReader

    slicing: Any = {"mode": mode, "select": select}
    stages = (
        ImageReader(),
        PanoramaSlicer(slicing=Slicing(num_frames=num_frames, frame_px=frame_px, fov_deg=fov_deg, **slicing)),
    )
    out.mkdir(parents=True, exist_ok=True)
    written, failures = [], {}
    for row in _rows_to_slice(images):
        batch = {name: _column(name, value) for name, value in row.items()}
        reason = None
        for stage in stages:
            batch = stage(batch)
            reason = batch.pop("failure", np.array([None]))[0]
            if reason is not None:
                break
        if reason is not None:
            failures[str(row["image_uri"])] = str(reason)
            typer.echo(f"Error: {row['image_uri']}: {reason}", err=True)
            continue
        target = out / f"{Path(str(row['pano_id'])).stem}.jpg"
        Image.fromarray(np.concatenate(list(batch["frames"][0]), axis=1)).save(target, quality=90)
        written.append(str(target))
    storage.write_bytes(str(out / "rejected.json"), (json.dumps(failures, indent=1) + "\n").encode())
    counts = {"num_in": len(written) + len(failures), "num_out": len(written), "num_rejected": len(failures)}
    show({**counts, "files": written, "rejected": failures}, f"{len(written)} of {counts['num_in']} sliced into {out}")
    if failures:
        raise typer.Exit(3)


def _rows_to_slice(sources: list[str]) -> list[dict[str, Any]]:
    from hedwig import storage
    from hedwig.sources import check_listing, read_listing

    rows: list[dict[str, Any]] = []
    for source in sources:
        if source.lower().endswith((".csv", ".tsv", ".parquet", ".geoparquet")):
            path = storage.resolve(source)
            checked = check_listing(read_listing(path), image_root=os.path.dirname(path))
            rows += checked.panoramas.to_pylist()
        else:
            uri = storage.resolve(source)
            place = {"pano_id": os.path.basename(uri), "image_uri": uri, "projection": "equirectangular"}
            rows.append({**place, "heading": None, "bearing_uri": None, "bearing_deg": None})
    wanted = ("pano_id", "image_uri", "projection", "heading", "bearing_uri", "bearing_deg")
    return [{name: row[name] for name in wanted} for row in rows]


def _column(name: str, value: Any) -> Any:
    """A batch of one row, as the stages take it."""
    import numpy as np

    if name == "heading":
        return np.array([np.nan if value is None else value], dtype=np.float64)
    column = np.empty(1, dtype=object)
    column[0] = value
    return column


@config_app.command("show")
def config_show(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Experiment file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    as_json: Json = False,
) -> None:
    """Print the resolved experiment: preset, file and overrides together, validated."""
    set_up(as_json=as_json)
    import yaml

    from hedwig.config import load_experiment

    settings = load_experiment(experiment, overrides or ()).model_dump(mode="json")
    show(settings, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip())


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of an experiment file, for editors."""
    from hedwig.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


def doctor(as_json: Json = False) -> None:
    """Check this machine: one line each, OK or what to do."""
    set_up(as_json=as_json)
    checks = dict(_checks())
    lines = [f"{'OK ' if good else 'FIX'}  {name:<12} {text}" for name, (good, text) in checks.items()]
    show({name: {"ok": good, "text": text} for name, (good, text) in checks.items()}, "\n".join(lines))
    if not all(good for good, _ in checks.values()):
        raise typer.Exit(1)


def _checks() -> list[tuple[str, tuple[bool, str]]]:
    import sys

    checks: list[tuple[str, tuple[bool, str]]] = []
    checks.append(("python", ((3, 11) <= sys.version_info[:2] <= (3, 13), platform.python_version())))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    checks.append(("memory", (memory >= 4, f"{memory:.0f} GiB ({os.cpu_count()} cores); 4 GiB are needed")))
    free = shutil.disk_usage(".").free / 2**30
    checks.append(("disk", (free >= 2, f"{free:.0f} GiB free here; the demo needs about 1")))
    for package in _PACKAGES:
        try:
            checks.append((package, (True, importlib.metadata.version(package))))
        except importlib.metadata.PackageNotFoundError:
            checks.append((package, (package == "faiss-cpu" and _has("faiss-gpu"), "not installed; run `make setup`")))
    try:
        import torch

        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none; everything runs on the CPU"
        checks.append(("gpu", (True, gpu)))
    except ImportError as error:
        checks.append(("gpu", (False, f"torch cannot be imported: {error}")))
    try:
        with tempfile.NamedTemporaryFile(dir="."):
            checks.append(("writable", (True, os.getcwd())))
    except OSError as error:
        checks.append(("writable", (False, f"{os.getcwd()}: {error}")))
    with socket.socket() as probe:
        busy = probe.connect_ex(("127.0.0.1", 8000)) == 0
    checks.append(("port 8000", (True, "taken; give hedwig serve another --port" if busy else "free for hedwig serve")))
    checks += _exposure()
    keys = "set" if os.environ.get("AWS_ACCESS_KEY_ID") else "not set; needed only for s3:// that asks for them"
    checks.append(("s3 keys", (True, keys)))
    return checks


def _exposure() -> list[tuple[str, tuple[bool, str]]]:
    """Whether Ray's ports can be reached from other machines, and whether it asks for a token."""
    from hedwig.serving.tokens import tokens_off

    listening = _listening()
    running = {port: name for port, name in _RAY_PORTS.items() if port in listening}
    open_ = [f"{port} ({name}) at {', '.join(sorted(listening[port]))}" for port, name in running.items()]
    exposed = [text for text, port in zip(open_, running, strict=True) if not all(map(_is_loopback, listening[port]))]
    advice = "close them in the firewall: whoever reaches them runs code here"
    ports = f"{'; '.join(exposed)}: {advice}" if exposed else "; ".join(open_) or "no Ray listens at 6379, 8265, 10001"
    unset = "RAY_AUTH_MODE" not in os.environ
    if tokens_off():
        tokens = (False, f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}: unset it, or set it to token")
    elif running and unset:
        tokens = (False, "a Ray runs here and RAY_AUTH_MODE is not set: `ray start` then asks nobody; set it to token")
    else:
        tokens = (True, "on in what hedwig starts" + ("; set RAY_AUTH_MODE=token for `ray start`" if unset else ""))
    return [("ray ports", (not exposed, ports)), ("ray tokens", tokens)]


def _listening() -> dict[int, set[str]]:
    """Addresses on which something listens, by port; from the kernel's tables, or where there are none by asking."""
    found: dict[int, set[str]] = {}
    for table, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:
            continue
        for row in rows:
            if row[3] != "0A":  # LISTEN
                continue
            digits, number = row[1].split(":")
            words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
            found.setdefault(int(number, 16), set()).add(socket.inet_ntop(family, b"".join(words)))
    if not Path("/proc/net/tcp").exists():
        for port in _RAY_PORTS:
            for address in {"127.0.0.1", *(str(info[4][0]) for info in _own_addresses())}:
                with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
                    probe.settimeout(0.5)
                    if probe.connect_ex((address, port)) == 0:
                        found.setdefault(port, set()).add(address)
    return found


def _own_addresses() -> list[Any]:
    try:
        return socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []


def _is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def _has(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False
