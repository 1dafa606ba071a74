"""The geolocator head learns on a toy table, survives killed workers and drivers, and refuses bad tables at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hedwig.geo import haversine_km, unit_vectors
from hedwig.geocells.hierarchy import Level
from hedwig.models.geolocator import Geolocator
from hedwig.schema import vector_field
from hedwig.training import head, train_geolocator
from hedwig.vectors import read_vectors, vector_array

DIM = 16


def toy_table(folder: Path, *, num: int = 600, seed: int = 0, files: int = 2, reverse: bool = False, **change) -> Path:
    """Embeddings that are noisy random functions of the position, over a few thousand kilometres."""
    rng = np.random.default_rng(seed)
    lat, lon = rng.uniform(-30, 30, num), rng.uniform(-60, 60, num)
    weights = np.random.default_rng(99).normal(size=(3, DIM))
    image = np.cos(unit_vectors(lat, lon) @ weights * 3) + rng.normal(0, 0.05, (num, DIM))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text = rng.normal(size=(num, 4))
    columns = {
        "pano_id": np.array([f"p{i:04d}" for i in rng.permutation(num)]),
        "lat": lat,
        "lon": lon,
        "split": np.where(np.arange(num) % 5 == 0, "val", "train"),
        "image_embedding": image.astype(np.float32),
        "text_embedding": (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32),
        **change,
    }
    folder.mkdir(parents=True)
    order = np.arange(num)[::-1] if reverse else np.arange(num)
    for i, part in enumerate(np.array_split(order, files)):
        fields = [vector_field(name, v.shape[1]) if v.ndim == 2 else None for name, v in columns.items()]
        arrays = [
            pa.array(v[part]) if field is None else vector_array(v[part], field)
            for v, field in zip(columns.values(), fields, strict=True)
        ]
        kinds = [field or pa.field(name, a.type) for name, field, a in zip(columns, fields, arrays, strict=True)]
        pq.write_table(pa.table(arrays, schema=pa.schema(kinds)), folder / f"part-{i}.parquet")
    return folder


class Grid:
    """Cells of 15° by 15°: the least that training asks of geocells."""

    def __init__(self) -> None:
        lat, lon = np.meshgrid(np.arange(-22.5, 30, 15), np.arange(-52.5, 60, 15), indexing="ij")
        self.table = {"lat": lat.ravel(), "lon": lon.ravel()}

    @classmethod
    def load(cls, folder: str) -> Grid:
        return cls()

    def assign(self, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        row = np.clip((np.asarray(lat) + 30) // 15, 0, 3)
        return (row * 8 + np.clip((np.asarray(lon) + 60) // 15, 0, 7)).astype(np.int64)


@pytest.fixture(autouse=True)
def grid(monkeypatch: pytest.MonkeyPatch) -> None:
    import hedwig.geocells

    monkeypatch.setattr(hedwig.geocells, "Geocells", Grid, raising=False)


def train(table: Path, tmp_path: Path, **options) -> dict:
    defaults = {
        "geocells": "",
        "output": str(tmp_path / "out"),
        "scratch": str(tmp_path / "scratch"),
        "run_name": "run",
        "projection_dim": 32,
        "hidden_dim": 64,
        "tau_km": 500.0,
        "epochs": 30,
        "batch_size": 64,
        "learning_rate": 3e-3,
        "num_workers": 0,
        "checkpoint_interval_s": 0.0,
    }
    return train_geolocator(embeddings=str(table), **{**defaults, **options})


def constant_error_km(table: Path) -> float:
    rows = pq.read_table(table, columns=["lat", "lon", "split"]).to_pandas()
    val, fit = rows[rows.split == "val"], rows[rows.split == "train"]
    return float(np.median(haversine_km(fit.lat.median(), fit.lon.median(), val.lat, val.lon)))


@pytest.mark.parametrize("loss", ["ce", "mse", "haversine", "haversine_raw"])
def test_it_learns_and_writes_a_calibrated_model(tmp_path, loss):
    table = toy_table(tmp_path / "table")
    metrics = train(table, tmp_path, loss=loss, cosine=loss == "haversine")
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] < (0.8 if loss == "mse" else 0.6) * rows[0]["train_loss"]
    assert metrics["val_median_error_km"] < 0.35 * constant_error_km(table)
    assert metrics["val_loss"] == min(row["val_loss"] for row in rows)
    assert [row["epoch"] for row in rows] == list(range(metrics["num_epochs"]))
    model = Geolocator.load(tmp_path / "out")
    assert model.config.temperature == metrics["temperature"] != 1.0
    # The temperature is the best on the validation rows, so a neighbouring one is no better.
    data = pq.read_table(table, filters=[("split", "=", "val")])
    image = torch.from_numpy(read_vectors(data, "image_embedding").copy())
    text = torch.from_numpy(read_vectors(data, "text_embedding").copy())
    cells = torch.from_numpy(Grid().assign(data["lat"].to_numpy(), data["lon"].to_numpy()))
    with torch.no_grad():
        logits = model(image, text)[1]
    assert metrics["val_nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, cells).item(), rel=1e-4)
    assert metrics["val_nll"] <= metrics["val_nll_uncalibrated"]
    assert 0 <= metrics["val_ece"] < 0.3
    here, *others = (torch.nn.functional.cross_entropy(logits * f, cells).item() for f in (1.0, 1.2, 1 / 1.2))
    assert here < min(others)


def test_shuffled_labels_fall_to_chance(tmp_path):
    """Broken on purpose: rows whose positions are those of other rows must teach nothing that holds elsewhere."""
    table = toy_table(tmp_path / "table", num=1000)
    whole = pq.read_table(table)
    # Shuffled among rows of a split: the distribution over cells stays as it was, and with it what chance is.
    rng, place = np.random.default_rng(1), np.arange(1000)
    for split in ("train", "val"):
        rows = np.flatnonzero(whole["split"].to_numpy(zero_copy_only=False) == split)
        place[rows] = rng.permutation(rows)
    image = read_vectors(whole, "image_embedding")[place]
    shuffled = toy_table(tmp_path / "shuffled", num=1000, image_embedding=image)
    right, wrong = (train(t, tmp_path / f"of-{t.name}", use_text=False) for t in (table, shuffled))
    assert right["val_accuracy"] > 0.5
    chance = 1 / 32  # cells of nearly equal share
    assert wrong["val_accuracy"] < chance + 4 * np.sqrt(chance * (1 - chance) / wrong["num_val"])
    assert wrong["val_median_error_km"] > 0.85 * constant_error_km(table)
    assert wrong["val_nll"] > np.log(32) - 0.1  # no better than saying nothing


def test_coarser_levels_and_pairs_are_trained_on(tmp_path, monkeypatch):
    table = toy_table(tmp_path / "table")
    monkeypatch.setattr(Grid, "hierarchy", lambda self: [Level.of("row", np.arange(32) // 8)], raising=False)
    plain = train(table, tmp_path / "a", epochs=8, loss="ce")
    levels = train(table, tmp_path / "b", epochs=8, loss="ce", hierarchy_weights=(2.0,))
    assert levels["val_loss"] > plain["val_loss"]  # it has a term more
    pairs = train(table, tmp_path / "c", epochs=8, loss="ce", contrastive_weight=1.0, near_km=700.0, far_km=2000.0)
    assert "share_with_near" not in plain
    assert 0.5 < pairs["share_with_near"] <= 1
    assert pairs["train_loss"] > plain["train_loss"]
    vectors = pq.read_table(table)
    image, text = (torch.from_numpy(read_vectors(vectors, f"{name}_embedding").copy()) for name in ("image", "text"))
    rows = vectors.to_pandas()
    cells = Grid().assign(rows.lat, rows.lon)
    val = (rows.split == "val").to_numpy().copy()
    distance = haversine_km(
        rows.lat[val].to_numpy()[:, None], rows.lon[val].to_numpy()[:, None],
        rows.lat[val].to_numpy()[None], rows.lon[val].to_numpy()[None],
    )  # fmt: skip
    near, far = (distance < 700) & (distance > 0), distance > 2000
    gap, row_loss = {}, {}
    for name in "abc":
        with torch.no_grad():
            projected, logits = Geolocator.load(tmp_path / name / "out")(image[val], text[val])
        cosines = (projected @ projected.T).numpy()
        gap[name] = cosines[near].mean() - cosines[far].mean()
        probs = logits.softmax(dim=1).reshape(-1, 4, 8).sum(dim=2)
        row_loss[name] = -probs[torch.arange(len(probs)), torch.from_numpy(cells[val] // 8)].log().mean().item()
    assert gap["c"] > gap["a"] + 0.1
    assert row_loss["b"] < row_loss["a"]


def test_row_order_and_files_do_not_matter(tmp_path):
    results = []
    for i, (files, reverse) in enumerate(((1, False), (3, True))):
        table = toy_table(tmp_path / f"table{i}", files=files, reverse=reverse)
        train(table, tmp_path / str(i), epochs=3, caption_dropout=0.5)
        results.append((tmp_path / str(i) / "out/model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_another_seed_gives_another_model(tmp_path):
    table = toy_table(tmp_path / "table")
    losses = [train(table, tmp_path / str(seed), epochs=1, seed=seed)["train_loss"] for seed in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def test_it_stops_when_the_validation_loss_no_longer_falls(tmp_path):
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(600, DIM)).astype(np.float32)  # nothing to learn, so the loss on other rows must rise
    table = toy_table(tmp_path / "table", image_embedding=noise / np.linalg.norm(noise, axis=1, keepdims=True))
    metrics = train(table, tmp_path, epochs=60, patience=4, loss="ce", learning_rate=1e-2)
    assert metrics["num_epochs"] < 60
    assert metrics["epoch"] == metrics["num_epochs"] - 5


def test_without_validation_rows_the_last_epoch_is_kept(tmp_path):
    table = toy_table(tmp_path / "table", split=np.full(600, "train"))
    metrics = train(table, tmp_path, epochs=3, patience=1)
    assert (metrics["num_epochs"], metrics["epoch"], metrics["temperature"]) == (3, 2, 1.0)
    assert metrics["num_val"] == 0
    assert "val_loss" not in metrics


def test_caption_dropout_makes_the_head_work_without_captions(tmp_path):
    table = toy_table(tmp_path / "table")
    rows = pq.read_table(table)
    lat_lon = np.stack([rows["lat"].to_numpy(), rows["lon"].to_numpy()])
    caption = np.concatenate([unit_vectors(*lat_lon), np.ones((600, 1))], axis=1) / np.sqrt(2)  # tells all
    telling = toy_table(tmp_path / "telling", text_embedding=caption.astype(np.float32))
    assert train(telling, tmp_path / "a", epochs=10)["val_accuracy"] > 0.3
    mute = np.zeros((600, 4), dtype=np.float32)
    image = torch.from_numpy(read_vectors(rows, "image_embedding").copy())
    cells = torch.from_numpy(Grid().assign(*lat_lon))
    hits = {}
    for dropout in (0.0, 0.5):
        train(telling, tmp_path / f"d{dropout}", epochs=30, caption_dropout=dropout)
        with torch.no_grad():
            logits = Geolocator.load(tmp_path / f"d{dropout}/out")(image, torch.from_numpy(mute))[1]
        hits[dropout] = (logits.argmax(1) == cells).float().mean().item()
    assert hits[0.5] > hits[0.0] + 0.05


def test_the_pool_finds_the_frame_that_tells(tmp_path):
    """One of four frames is a function of the position, marked by a constant; the mean of all drowns it in noise."""
    rng = np.random.default_rng(8)
    table = toy_table(tmp_path / "table")
    telling = read_vectors(pq.read_table(table), "image_embedding")
    frames = rng.normal(size=(600, 4, DIM))
    frames /= np.linalg.norm(frames, axis=2, keepdims=True)
    where = rng.integers(0, 4, 600)
    mark = np.zeros((600, 4, 2))
    mark[..., 0] = -1
    mark[np.arange(600), where] = [1, 0]
    frames[np.arange(600), where] = telling
    frames = np.concatenate([frames, mark], axis=2)
    frames = (frames / np.linalg.norm(frames, axis=2, keepdims=True)).astype(np.float32)
    mean = frames.mean(axis=1)
    columns = {"image_embedding": mean, "frame_embeddings": frames.reshape(600, -1)}
    many = toy_table(tmp_path / "many", **columns)
    options = {"use_text": False, "epochs": 30}
    pooled = train(many, tmp_path / "a", image_column="frame_embeddings", num_frames=4, **options)
    plain = train(many, tmp_path / "b", **options)
    assert pooled["val_median_error_km"] < 0.7 * plain["val_median_error_km"]
    model = Geolocator.load(tmp_path / "a" / "out")
    chosen = (torch.from_numpy(frames) @ model.query.detach()).argmax(dim=1).numpy()
    assert (chosen == where).mean() > 0.9
    with pytest.raises(ValueError, match=r"72 numbers a row, which are not 5 vectors; run `hedwig embed` again"):
        train(many, tmp_path / "c", image_column="frame_embeddings", num_frames=5, **options)


def test_an_encoder_without_text_is_refused(tmp_path):
    silent = toy_table(tmp_path / "table", text_embedding=np.zeros((600, 1), np.float32))
    with pytest.raises(ValueError, match=r"reads no text. Set training.use_text=false"):
        train(silent, tmp_path)
    assert train(silent, tmp_path, epochs=1, use_text=False)["num_train"] == 480


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": np.full(600, "test")}, "no training rows"),
        ({"lat": np.full(600, np.nan)}, "no training rows"),
        ({"image_embedding": np.full((600, DIM), np.nan, np.float32)}, "NaN or infinity, first"),
        ({"pano_id": np.full(600, "same")}, "'same' twice"),
        ({"image_embedding": np.zeros(600)}, "expected fixed-size binary"),
    ],
)
def test_bad_tables_are_refused_before_ray_starts(tmp_path, change, message, monkeypatch):
    monkeypatch.setattr(head, "run", lambda *a, **k: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match=message):
        train(toy_table(tmp_path / "table", **change), tmp_path, num_workers=1)


def test_queries_and_rows_without_a_position_are_left_out(tmp_path):
    lat = np.random.default_rng(0).uniform(-30, 30, 600)
    lat[::3] = np.nan
    metrics = train(toy_table(tmp_path / "table", lat=lat), tmp_path, epochs=1)
    assert metrics["num_train"] + metrics["num_val"] == 400


def test_bad_settings_name_the_value(tmp_path):
    table = toy_table(tmp_path / "table")
    for options, message in (
        ({"loss": "mae"}, "got 'mae'"),
        ({"hierarchy_weights": (1.0,)}, "build the geocells with more levels"),
        ({"near_km": 500.0}, "near_km <= far_km, got 500.0 and 200.0"),
        ({"min_workers": 2}, r"min_workers must be 1 to num_workers \(0\), got 2"),
        ({"cpus_per_worker": 0}, "cpus_per_worker must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"image_column": "image_embeding"}, "Did you mean 'image_embedding'"),
        ({"num_workers": 700}, "use fewer workers"),
    ):
        with pytest.raises(ValueError, match=message):
            train(table, tmp_path, **options)
    with pytest.raises(FileNotFoundError, match="run the stage that writes it"):
        train(tmp_path / "nowhere", tmp_path)


def test_two_workers_of_which_one_dies_end_where_one_undisturbed_process_does(tmp_path, ray_session, monkeypatch):
    table = toy_table(tmp_path / "table")  # 480 training rows: two equal shares
    options = {"batch_size": 480, "epochs": 4, "learning_rate": 1e-3, "patience": 9}
    alone = train(table, tmp_path / "alone", **options)
    # One batch is the whole split, so the mean of two half gradients is the gradient of one process.
    monkeypatch.setattr(head, "_worker", dying_worker(str(tmp_path / "died")))
    both = train(table, tmp_path / "both", num_workers=2, **options)
    assert (tmp_path / "died").exists()
    assert both["num_epochs"] == alone["num_epochs"] == 4
    curves = [(tmp_path / name / "out/metrics.jsonl").read_text().splitlines() for name in ("both", "alone")]
    for row, other in zip(*(map(json.loads, lines) for lines in curves), strict=True):
        for loss in ("train_loss", "val_loss"):
            assert row[loss] == pytest.approx(other[loss], rel=1e-4)
    assert both["val_median_error_km"] == pytest.approx(alone["val_median_error_km"], rel=1e-6)
    # A finished run starts no worker again, and refuses other settings.
    monkeypatch.setattr(head.ray.train.torch.TorchTrainer, "fit", lambda self: pytest.fail("it trained again"))
    again = train(table, tmp_path / "both", num_workers=2, **options)
    assert again["val_loss"] == both["val_loss"]
    with pytest.raises(ValueError, match="other settings"):
        train(table, tmp_path / "both", num_workers=2, **{**options, "epochs": 5})


def dying_worker(flag: str):
    original = head._worker

    def worker(settings: dict) -> None:
        import ray.train

        from hedwig.training.head import _Fit

        whole = _Fit.epoch

        def epoch(self, *args, **kwargs):
            if len(self.history) == 2 and ray.train.get_context().get_world_rank() == 1 and not os.path.exists(flag):
                Path(flag).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            whole(self, *args, **kwargs)

        _Fit.epoch = epoch
        original(settings)

    return worker


@pytest.mark.slow
def test_a_killed_driver_continues(tmp_path):
    toy_table(tmp_path / "table")
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import ray, hedwig.geocells, test_training_head as toy
        hedwig.geocells.Geocells = toy.Grid
        ray.init(address="local", num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
        here = Path({str(tmp_path)!r})
        def worker(settings):
            import time
            from hedwig.training import head
            whole = head._Fit.epoch
            def slow(self, *args, **kwargs):
                whole(self, *args, **kwargs)
                time.sleep(1.5)
                with open(here / "epochs", "a") as log:
                    log.write(f"{{len(self.history)}}\\n")
            head._Fit.epoch = slow
            original(settings)
        original = toy.head._worker
        toy.head._worker = worker
        toy.train(here / "table", here, num_workers=1, epochs=8)
        """)
    )
    log = tmp_path / "epochs"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    first = subprocess.Popen([sys.executable, str(script)], env=environment)
    deadline = time.monotonic() + 200
    while not (log.exists() and len(log.read_text().split()) >= 4) and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "out/model.json").exists()
    before = len(log.read_text().split())
    subprocess.run([sys.executable, str(script)], env=environment, check=True, timeout=300)
    epochs = [int(word) for word in log.read_text().split()]
    assert epochs[-1] == 8
    assert len(epochs) - before < 8  # it did not start from nothing
    assert (tmp_path / "out/model.safetensors").exists()
