"""hedwig's embedding path beside what a user would pick instead: same images, same model, same machine, one run.

Every contender is a process of its own, run in turns on a few panoramas and on more of them. What it costs per panorama
is the difference, so that imports and model loading are left out; the ratios with them are printed too. CPU seconds are
those of the process and all its children, from the kernel's account of ended processes. Ratios compare CPU seconds per
panorama, on a GPU machine look at panoramas a second as well. clip-retrieval reads square pictures only, so that
cutting the panoramas into files is counted with it in one ratio and left out in the other. The model is random,
saved to a file once: equal vectors are checked, their quality means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from hedwig.benchmark.pipeline import tree_cpu_s
from hedwig.benchmark.preprocessing import synthetic_panoramas
from hedwig.storage import read_table
from hedwig.vectors import read_vectors

__all__ = ["Cost", "Turn", "compare", "cost_of", "measured", "ratios_of"]

HERE = Path(__file__).parent
PR_SET_CHILD_SUBREAPER = 36
OURS, SCRIPT, CLIP, CUTTING, RAY = "hedwig", "dataloader", "clip_retrieval", "frame_files", "hedwig_ray"
Vectors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Turn:
    """One process: how many panoramas, and the seconds of CPU and of the clock that it took."""

    num: int
    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class Cost:
    """What one contender costs.

    Attributes:
        cpu_ms_per_panorama: beyond the start.
        panoramas_per_cpu_s: beyond the start.
        panoramas_per_s: beyond the start, by the clock.
        start_cpu_s: what the process takes before the first panorama.
        whole_panoramas_per_cpu_s: of the larger run, start and all.
    """

    cpu_ms_per_panorama: float
    panoramas_per_cpu_s: float
    panoramas_per_s: float
    start_cpu_s: float
    whole_panoramas_per_cpu_s: float


def measured(command: Sequence[str], num: int, environment: dict[str, str]) -> Turn:
    """Run a command to its end, and to that of every process that it leaves behind.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    seen: dict[tuple[int, int], float] = {}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)  # noqa: S603 - built here
        while process.poll() is None:
            seen.update({key: cpu for key, cpu in tree_cpu_s(os.getpid()).items() if key[0] != os.getpid()})
            time.sleep(0.25)
        wall_s = time.perf_counter() - began
        if process.returncode:
            log.seek(0)
            end = log.read()[-3000:].decode(errors="replace")
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{end}")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.1)
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    reaped = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # A parent that ignores its children's end (Ray has some) loses their account: then what was seen last counts.
    return Turn(num, max(reaped, sum(seen.values())), wall_s)


def cost_of(turns: Sequence[Turn]) -> Cost:
    """From turns with few and with many panoramas; medians where there are several of a kind.

    Raises:
        ValueError: all had the same number of panoramas.
    """
    sizes = sorted({turn.num for turn in turns})
    if len(sizes) != 2:
        raise ValueError(f"Turns of two sizes are needed, got {sizes}.")
    few, many = ([turn for turn in turns if turn.num == size] for size in sizes)
    cpu = [statistics.median(turn.cpu_s for turn in some) for some in (few, many)]
    wall = [statistics.median(turn.wall_s for turn in some) for some in (few, many)]
    more = sizes[1] - sizes[0]
    per_s = (cpu[1] - cpu[0]) / more
    return Cost(1000 * per_s, 1 / per_s, more / (wall[1] - wall[0]), cpu[0] - sizes[0] * per_s, sizes[1] / cpu[1])


def ratios_of(costs: dict[str, Cost]) -> dict[str, float]:
    """How many times less CPU hedwig takes; clip-retrieval with and without cutting its files."""
    ours, script, clip, cutting = (costs.get(name) for name in (OURS, SCRIPT, CLIP, CUTTING))
    ratios: dict[str, float] = {}
    if ours is None:
        return ratios

    def add(name: str, ms: float, whole_s: float) -> None:
        ratios[name] = ms / ours.cpu_ms_per_panorama
        ratios[f"{name}_with_start"] = whole_s * ours.whole_panoramas_per_cpu_s

    if script is not None:
        add("hedwig_vs_dataloader", script.cpu_ms_per_panorama, 1 / script.whole_panoramas_per_cpu_s)
    if clip is not None and cutting is not None:
        ms, whole_s = clip.cpu_ms_per_panorama, 1 / clip.whole_panoramas_per_cpu_s
        both_s = whole_s + 1 / cutting.whole_panoramas_per_cpu_s
        add("hedwig_vs_clip_retrieval", ms + cutting.cpu_ms_per_panorama, both_s)
        add("hedwig_vs_clip_retrieval_frames_given", ms, whole_s)
    for name in (SCRIPT, OURS):
        if f"{name}_float32" in costs:
            ratios[f"hedwig_vs_{name}_float32"] = (
                costs[f"{name}_float32"].cpu_ms_per_panorama / ours.cpu_ms_per_panorama
            )
    if RAY in costs:
        add("hedwig_vs_hedwig_ray", costs[RAY].cpu_ms_per_panorama, 1 / costs[RAY].whole_panoramas_per_cpu_s)
    return ratios


def compare(asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run everybody in turns; see the module's text.

    Args:
        asked: the command line.
        work: an empty folder.
    """
    weights = Path(asked.weights) if asked.weights else _random_weights(asked.model, work / "weights.pt")
    folders = _folders(asked, work)
    threads = str(asked.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    environment |= {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if asked.device == "cpu" else {}
    contenders = dict(_contenders(asked, str(weights)))
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for round_ in range(asked.rounds):
        for folder, num in folders:
            for name, command in contenders.items():
                out = work / "out" / f"{num}" / name
                shutil.rmtree(out, ignore_errors=True)
                turns[name].append(measured(command(folder, out), num, environment))
                sys.stderr.write(f"round {round_ + 1}, {num} panoramas, {name}: {turns[name][-1].cpu_s:.1f} CPU s\n")
    costs = {name: cost_of(some) for name, some in turns.items()}
    most = work / "out" / str(folders[-1][1])
    vectors = {name: found for name in contenders if (found := _read(name, most / name)) is not None}
    return {
        "model": asked.model,
        "dtype": asked.dtype,
        "device": asked.device,
        "panoramas": [num for _, num in folders],
        "rounds": asked.rounds,
        "threads": asked.threads,
        "ratios": ratios_of(costs),
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "agreement": {name: _agreement(vectors[OURS], found) for name, found in vectors.items() if name != OURS},
    }


def _random_weights(model: str, path: Path) -> Path:
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model(model, pretrained=None).state_dict(), path)
    return path


def _folders(asked: argparse.Namespace, work: Path) -> list[tuple[Path, int]]:
    """A folder of few panoramas and one of more."""
    if asked.folder:
        given = sorted(Path(asked.folder).glob("*.jpg"))[: asked.images]
        files = [path.read_bytes() for path in given]
    else:
        files = synthetic_panoramas(asked.images)
    if len(files) <= asked.few:
        raise ValueError(f"{len(files)} panoramas, and --few {asked.few} of them; give more, or make --few smaller.")
    folders = []
    for num in (asked.few, len(files)):
        folder = work / f"panoramas-{num}"
        folder.mkdir()
        for number, content in enumerate(files[:num]):
            (folder / f"p{number:06d}.jpg").write_bytes(content)
        folders.append((folder, num))
    return folders


Command = Callable[[Path, Path], list[str]]


def _contenders(asked: argparse.Namespace, weights: str) -> Iterator[tuple[str, Command]]:
    """Name and command line, in the order of a turn."""
    batch, threads = str(asked.batch), str(asked.threads)
    common = ["--model", asked.model, "--weights", weights, "--device", asked.device, "--batch", batch]

    def python(script: str, *options: str) -> Command:
        return lambda images, out: [sys.executable, str(HERE / script), str(images), str(out), *options]

    dtypes = [asked.dtype] + (["float32"] if asked.float32 and asked.dtype != "float32" else [])
    for dtype in dtypes:
        end = "" if dtype == asked.dtype else f"_{dtype}"
        yield OURS + end, python("in_process.py", *common, "--dtype", dtype, "--threads", threads)
        yield SCRIPT + end, python("dataloader.py", *common, "--dtype", dtype, "--workers", threads)
    if asked.ray:
        yield RAY, lambda images, out: _ray_command(asked, weights, images, out)
    if asked.clip_retrieval:
        yield CUTTING, python("frame_files.py")
        yield CLIP, lambda images, out: [
            str(Path(asked.clip_retrieval) / "bin" / "clip-retrieval"), "inference",
            "--input_dataset", str(out.with_name(CUTTING)), "--output_folder", str(out), "--enable_text", "False",
            "--clip_model", f"open_clip:{asked.model}/{weights}",  # an absolute path: two slashes in all
            "--batch_size", str(8 * asked.batch), "--num_prepro_workers", threads, "--output_partition_count", "1",
            "--cache_path", "None",
        ]  # fmt: skip


def _ray_command(asked: argparse.Namespace, weights: str, images: Path, out: Path) -> list[str]:
    """`hedwig run --until embed` on one actor, its experiment written beside the result."""
    quick = asked.model.endswith("quickgelu")
    listing = out.with_suffix(".csv")
    listing.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{path.stem},48.1,11.6,train,equirectangular,{path}" for path in sorted(images.glob("*.jpg"))]
    listing.write_text("\n".join(["pano_id,lat,lon,split,projection,image_uri", *lines]) + "\n")
    experiment = {
        "name": "compare",
        "output": str(out),
        "data": {"panoramas": str(listing), "split": {"method": "column"}},
        "captions": {"source": "none"},
        "encoder": {"name": f"open_clip:{asked.model}", "weights": weights, "dtype": asked.dtype, "quick_gelu": quick},
        "embed": {"batch_size": asked.batch, "num_threads": asked.threads, "rows_per_block": 8 * asked.batch},
        "training": {"use_text": False},
        "index": {"embedding": "image"},
    }
    if asked.device == "cuda":
        experiment["embed"]["num_gpus"] = 1.0  # type: ignore[index]
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(experiment))
    return [str(Path(sys.executable).with_name("hedwig")), "run", str(path), "--until", "embed", "--quiet"]


def _read(name: str, out: Path) -> Vectors | None:
    """(D,) unit vectors by panorama; None of a contender that makes none."""
    if name.startswith(SCRIPT):
        names = (out / "names.txt").read_text().split()
        return dict(zip(names, np.load(out / "embeddings.npy"), strict=True))
    if name == CLIP:
        each = np.load(out / "img_emb" / "img_emb_0.npy").astype(np.float32)
        paths = pq.read_table(out / "metadata" / "metadata_0.parquet")["image_path"].to_pylist()
        frames: dict[str, list[NDArray[np.float32]]] = {}
        for path, vector in zip(paths, each / np.linalg.norm(each, axis=1, keepdims=True), strict=True):
            frames.setdefault(Path(path).stem.rsplit("-", 1)[0], []).append(vector)
        means = {pano: np.mean(some, axis=0) for pano, some in frames.items()}
        return {pano: mean / np.linalg.norm(mean) for pano, mean in means.items()}
    if name.startswith(OURS):
        table = read_table(str(out / "embeddings" if name == RAY else out))
        return dict(zip(table["pano_id"].to_pylist(), read_vectors(table, "image_embedding"), strict=True))
    return None


def _agreement(ours: Vectors, theirs: Vectors) -> dict[str, float]:
    """Least cosine, and the share of panoramas that find themselves among the other's, both centred."""
    names = sorted(ours)
    a, b = (np.stack([some[name] for name in names]) for some in (ours, theirs))
    centred = [x - x.mean(axis=0) for x in (a, b)]
    a_unit, b_unit = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in centred)
    found = (a_unit @ b_unit.T).argmax(axis=1) == np.arange(len(names))
    return {"min_cosine": float((a * b).sum(axis=1).min()), "found_itself": float(found.mean())}


def text_of(figures: dict[str, Any]) -> str:
    """For readers."""
    few, many = figures["panoramas"]
    lines = [
        f"{figures['model']} in {figures['dtype']} on {figures['device']}, {figures['threads']} thread(s); "
        f"{many} panoramas less {few}, {figures['rounds']} round(s)",
        f"{'':22}{'CPU ms/panorama':>17}{'panoramas/CPU s':>17}{'panoramas/s':>13}{'start CPU s':>13}",
    ]
    for name, cost in figures["costs"].items():
        lines.append(
            f"{name:22}{cost['cpu_ms_per_panorama']:17.1f}{cost['panoramas_per_cpu_s']:17.3f}"
            f"{cost['panoramas_per_s']:13.3f}{cost['start_cpu_s']:13.1f}"
        )
    lines += [f"{name}: {ratio:.2f}" for name, ratio in figures["ratios"].items()]
    for name, found in figures["agreement"].items():
        lines.append(
            f"{name}: least cosine to hedwig's {found['min_cosine']:.5f}, {found['found_itself']:.0%} find themselves"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32, help="panoramas of the larger turns")
    parser.add_argument("--few", type=int, default=8, help="panoramas of the smaller turns")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", help="of .jpg panoramas; default: synthetic ones of 2048 x 1024 px")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip architecture")
    parser.add_argument("--weights", help="file; default: random ones, saved")
    parser.add_argument("--dtype", default="bfloat16", help="of hedwig and of the script")
    parser.add_argument("--float32", action="store_true", help="these two in float32 as well")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=8, help="panoramas at once")
    parser.add_argument("--threads", type=int, default=1, help="of torch, and decoding threads or processes")
    parser.add_argument("--clip-retrieval", metavar="VENV", help="virtual environment that holds it")
    parser.add_argument("--ray", action="store_true", help="hedwig's whole job on a local Ray as well")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    with contextlib.suppress(AttributeError, OSError):  # orphans of a contender come to us, and so their account
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="hedwig-compare-") as work:
        figures = compare(asked, Path(work))
    sys.stdout.write((json.dumps(figures, indent=1) if asked.json else text_of(figures)) + "\n")


if __name__ == "__main__":
    main()
