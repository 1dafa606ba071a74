"""A run folder asked in every way: images of all kinds, tables, and folders whose parts do not belong together."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hedwig import storage
from hedwig.captions import TemplateCaptioner
from hedwig.embed import Embedder
from hedwig.index import GeocellIndex
from hedwig.models.encoder import load_encoder, save_encoder
from hedwig.models.geolocator import Geolocator, GeolocatorConfig
from hedwig.panorama import PanoramaSlicer, Slicing
from hedwig.retrieve import Calibration, Hedwig, Predictor, Retriever, load_retriever
from hedwig.retrieve.prototypes import Prototypes
from hedwig.retrieve.whitening import Whitening

NUM_CELLS, NUM_REFERENCES = 6, 12
ENCODER = {"name": "viclip-tiny", "weights": None, "seed": 0, "dtype": "float32"}


class FakeGeocells:
    """The only thing a retriever wants of geocells: a table with centroids and radii."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table

    @classmethod
    def load(cls, folder: Path) -> FakeGeocells:
        return cls(pd.read_csv(folder / "geocells.csv"))


@pytest.fixture(autouse=True)
def _geocells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hedwig.retrieve.run.Geocells", FakeGeocells)


def picture(seed: int, height: int = 64, width: int = 128) -> np.ndarray:
    """Smooth coloured blobs: different pictures differ, and JPEG changes them little."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def publish(folder: Path, kind: str, config: dict[str, Any], inputs: tuple[str, ...] = (), **other: Any) -> None:
    digests = {name: storage.manifest_digest(str(folder.parent / name)) for name in inputs}
    storage.publish(str(folder), kind=kind, config=config, inputs=digests, num_in=1, num_out=1, **other)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt at will."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """References embedded by the real stages, random head, index: the smallest complete run."""
    root = tmp_path_factory.mktemp("finished") / "run"
    slicing = {"mode": "wrap", "num_frames": 8}
    embedder = Embedder(encoder_name="viclip-tiny")
    slicer = PanoramaSlicer(slicing=Slicing(frame_px=embedder.encoder.frame_px, **slicing))
    batch: dict[str, Any] = {
        "pano_id": np.array([f"r{i:02d}" for i in range(NUM_REFERENCES)], dtype=object),
        "image_bytes": np.array([png(picture(i)) for i in range(NUM_REFERENCES)], dtype=object),
        "projection": np.full(NUM_REFERENCES, "equirectangular", dtype=object),
        "heading": np.full(NUM_REFERENCES, np.nan),
    }
    for stage in (slicer, TemplateCaptioner(), embedder):
        batch = stage(batch)
    assert batch["failure"].tolist() == [None] * NUM_REFERENCES
    (root / "embeddings").mkdir(parents=True)
    config = {"encoder": ENCODER, "slicing": slicing, "captions": {"source": "template"}}
    publish(root / "embeddings", "embeddings", config, details={"model_id": embedder.encoder.model_id})

    cells = np.arange(NUM_REFERENCES) % NUM_CELLS
    table = pd.DataFrame({"lat": 10.0 * np.arange(NUM_CELLS), "lon": -20.0 * np.arange(NUM_CELLS), "radius_km": 50.0})
    (root / "geocells").mkdir()
    table.to_csv(root / "geocells" / "geocells.csv")
    publish(root / "geocells", "geocells", {}, ("embeddings",))

    torch.manual_seed(0)
    image_dim, text_dim = batch["image_embedding"].shape[1], batch["text_embedding"].shape[1]
    geolocator = Geolocator(GeolocatorConfig(image_dim, text_dim, True, 16, NUM_CELLS)).eval()
    geolocator.save(root / "geolocator")
    publish(root / "geolocator", "geolocator", {}, ("embeddings", "geocells"))

    with torch.inference_mode():
        tensors = [torch.from_numpy(batch[f"{name}_embedding"]) for name in ("image", "text")]
        projected = geolocator(*tensors)[0].numpy()
    lat, lon = 10.0 * cells + 0.01 * np.arange(NUM_REFERENCES), -20.0 * cells
    index = GeocellIndex.build(projected, cells, batch["pano_id"], lat, lon, num_cells=NUM_CELLS, codec="fp32")
    index.save(root / "index")
    (root / "index" / "calibration.json").write_text(json.dumps({"radius_scale": 3.0}))
    settings = {"embedding": "projected", "codec": "fp32", "retrieve": {"num_cells": NUM_CELLS, "num_neighbours": 3}}
    publish(root / "index", "index", settings, ("embeddings", "geocells", "geolocator"))
    np.savez(root.parent / "embedded.npz", **{k: batch[k] for k in ("image_embedding", "text_embedding")})
    return root


def test_a_reference_asked_as_a_query_finds_itself(run: Path) -> None:
    hedwig = Hedwig.load(str(run))
    for i, found in enumerate(hedwig.locate_many([picture(i) for i in range(NUM_REFERENCES)], top_k=2)):
        assert found.neighbour_ids[0] == f"r{i:02d}"
        assert found.neighbour_scores[0] == pytest.approx(1.0, abs=1e-5)
        assert (found.lat, found.lon) == pytest.approx((10.0 * (i % NUM_CELLS) + 0.01 * i, -20.0 * (i % NUM_CELLS)))
        assert len(found.cell_ids) == len(found.neighbour_ids) == 2


def test_only_pixels_count(run: Path, tmp_path: Path) -> None:
    """Equal pixels with another name, with GPS Exif or as another type: equal answers, all the way to the last bit."""
    hedwig, pixels = Hedwig.load(str(run)), picture(3)
    plain, tagged = tmp_path / "a.png", tmp_path / "48.77,9.18_Stuttgart.png"
    plain.write_bytes(png(pixels))
    exif = Image.Exif()
    exif.get_ifd(0x8825).update({1: "S", 2: (33.0, 51.0, 0.0), 3: "E", 4: (151.0, 12.0, 0.0)})
    exif[0x0132] = "2011:01:01 00:00:00"
    Image.fromarray(pixels).save(tagged, exif=exif)
    assert tagged.read_bytes() != plain.read_bytes()
    expected = hedwig.locate(plain)
    with Image.open(tagged) as image:
        for same in (str(tagged), tagged.read_bytes(), image, pixels):
            assert hedwig.locate(same) == expected
    many = hedwig.locate_many([plain, picture(4), tagged])
    assert many[2] == many[0]
    assert many[0].neighbour_ids == expected.neighbour_ids  # a larger batch may round its products otherwise
    np.testing.assert_allclose(many[0].cell_probs, expected.cell_probs, rtol=1e-5)
    assert hedwig.locate(picture(4)) != expected


def test_an_exif_orientation_turns_pil_images_like_files(run: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    buffer = io.BytesIO()
    Image.fromarray(picture(2)[::-1, ::-1]).save(buffer, "PNG", exif=exif)
    hedwig = Hedwig.load(str(run))
    with Image.open(buffer) as image:
        assert hedwig.locate(image) == hedwig.locate(buffer.getvalue()) == hedwig.locate(picture(2))


def test_bearings_strips_and_photographs_are_told_apart(run: Path) -> None:
    hedwig, pixels = Hedwig.load(str(run)), picture(5, 64, 512)
    quarters = [pixels[:, i * 128 : (i + 1) * 128] for i in range(4)]
    stitched = replace(hedwig.locate(quarters), frames=())
    assert stitched == replace(hedwig.locate(pixels), frames=())  # stitched, they are the frame strip
    turned = hedwig.locate(quarters, bearings_deg=[90, 180, 270, 0])
    strip = hedwig.locate(np.concatenate([quarters[3], *quarters[:3]], axis=1))
    assert replace(turned, frames=()) == replace(strip, frames=())
    square = picture(6, 100, 100)
    assert hedwig.locate(square) == hedwig.locate(square, projection="perspective")
    with pytest.raises(ValueError, match="cylinder"):
        hedwig.locate(square, projection="cylinder")


def test_what_is_no_image_is_refused(run: Path, tmp_path: Path) -> None:
    hedwig = Hedwig.load(str(run))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        hedwig.locate(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match="Not a JPEG, PNG or WebP"):
        hedwig.locate(b"GIF89a and so on")
    with pytest.raises(ValueError, match="Cannot take a int"):
        hedwig.locate(7)
    with pytest.raises(ValueError, match="top_k"):
        hedwig.locate(picture(0), top_k=0)
    assert hedwig.locate_many([]) == []


def test_the_stage_gives_what_the_library_gives(run: Path, finished_run: Path) -> None:
    columns = dict(np.load(finished_run.parent / "embedded.npz"))
    columns["pano_id"] = np.array([f"x{i}" for i in range(NUM_REFERENCES)], dtype=object)
    out = Predictor(run=str(run), num_neighbours=2)(columns)
    located = Hedwig.load(str(run)).locate_many([picture(i) for i in range(NUM_REFERENCES)])
    np.testing.assert_allclose(out["lat"], [p.lat for p in located])
    np.testing.assert_allclose(out["radius_km"], [p.radius_km for p in located], rtol=1e-5)
    assert [len(ids) for ids in out["neighbour_ids"]] == [2] * NUM_REFERENCES
    assert Predictor.writes == Retriever.writes


def test_settings_come_from_the_predictions_then_the_index_then_the_caller(run: Path) -> None:
    first = load_retriever(str(run))
    assert (first.num_cells, first.num_neighbours, first.radius_scale, first.embedding) == (6, 3, 3.0, "projected")
    assert first.cell_floor_km.tolist() == [50.0] * NUM_CELLS
    (run / "predictions").mkdir()
    publish(run / "predictions", "predictions", {"retrieve": {"num_cells": 4, "refine": "mean"}}, ("index",))
    second = load_retriever(str(run), num_neighbours=9, radius_scale=1.0)
    assert (second.num_cells, second.num_neighbours, second.refine, second.radius_scale) == (4, 9, "mean", 1.0)
    manifest = run / "index" / "manifest.json"
    manifest.write_text(
        manifest.read_text() + "\n"
    )  # the index was made anew, with new settings: the old ones are void
    assert load_retriever(str(run)).num_cells == 6


def rebuilt(run: Path, retrieve: dict[str, Any], embedding: str, calibration: Calibration) -> GeocellIndex:
    """The run's index anew, of whitened image embeddings if so wanted, with all that such an index has beside it."""
    old = GeocellIndex.open(run / "index")
    shutil.rmtree(run / "index")
    (run / "index").mkdir()
    whitening = None
    vectors = old.vectors()
    if embedding == "whitened":
        columns = dict(np.load(run.parent / "embedded.npz"))
        vectors = columns["image_embedding"][[int(name[1:]) for name in old.pano_ids]]
        whitening = Whitening.fit(vectors)
        whitening.save(run / "index")
        vectors = whitening(vectors)
    who = (old.cell_ids, old.pano_ids, old.lat, old.lon)
    index = GeocellIndex.build(vectors, *who, num_cells=NUM_CELLS, codec="fp32")
    index.save(run / "index")
    if retrieve.get("refine") == "prototype":
        Prototypes.build(index).save(run / "index")
    calibration.save(run / "index" / "calibration.json", {})
    config = {"embedding": embedding, "codec": "fp32", "retrieve": retrieve}
    publish(run / "index", "index", config, ("embeddings", "geocells", "geolocator"))
    return index


def test_whitening_and_calibration_are_found_beside_the_index(run: Path, finished_run: Path, tmp_path: Path) -> None:
    shutil.copy(finished_run.parent / "embedded.npz", tmp_path)
    known = Calibration(radius_scale=2.0, radius_50_scale=0.5, score_temperature=0.5, log_prob_weight=0.01)
    rebuilt(run, {"num_cells": NUM_CELLS, "log_prob_weight": None}, "whitened", known)
    retriever = load_retriever(str(run))
    assert (retriever.log_prob_weight, retriever.score_temperature, retriever.radius_scale) == (0.01, 0.5, 2.0)
    hedwig = Hedwig.load(str(run))
    for i in (0, 5, 11):
        found = hedwig.locate(picture(i))
        assert found.neighbour_ids[0] == f"r{i:02d}"
        assert found.radius_50_km == pytest.approx(found.radius_km / 4)
    assert load_retriever(str(run), log_prob_weight=0.3).log_prob_weight == 0.3
    (run / "index" / "whitening.safetensors").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"whitening\.safetensors is damaged.*hedwig index"):
        load_retriever(str(run))


def test_prototypes_are_found_beside_the_index_or_their_lack_is_told(run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"prototypes\.safetensors is missing; set retrieve\.refine=prototype"):
        load_retriever(str(run), refine="prototype")
    index = rebuilt(run, {"num_cells": NUM_CELLS, "refine": "prototype"}, "projected", Calibration())
    found = Hedwig.load(str(run)).locate(picture(3))
    assert (found.lat, found.lon) in set(zip(index.lat, index.lon, strict=True))
    assert load_retriever(str(run), refine="cell").prototypes is None


def test_weights_inside_the_run_move_with_it(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encoder = load_encoder("viclip-tiny", seed=5)
    save_encoder(encoder.module, "viclip-tiny", run / "encoder" / "viclip-tiny", "trained")
    config = {"encoder": {**ENCODER, "weights": "encoder/viclip-tiny"}, "slicing": {"mode": "wrap"}}
    changed = storage.Manifest("embeddings", "", 1, 1, 0, config, details={"model_id": encoder.model_id})
    monkeypatch.setattr("hedwig.retrieve.run.load_retriever", lambda run, **options: None)
    monkeypatch.setattr("hedwig.retrieve.run._manifest", lambda run, name: changed)
    monkeypatch.chdir(tmp_path)
    assert Hedwig.load("run").embedder.encoder.model_id == encoder.model_id
    shutil.move(run / "encoder", tmp_path / "encoder")  # not in the run: then from where one stands
    assert Hedwig.load("run").embedder.encoder.model_id == encoder.model_id


@pytest.mark.parametrize(
    ("changed", "old", "command"),
    [("geolocator", "index", "index"), ("geocells", "geolocator", "train"), ("embeddings", "geocells", "geocells")],
)
def test_a_stale_artefact_refuses_to_load_and_is_named(run: Path, changed: str, old: str, command: str) -> None:
    manifest = run / changed / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(ValueError, match=rf"{old} is old: it was made from {changed} .*hedwig {command}"):
        Hedwig.load(str(run))


def test_an_index_that_does_not_say_what_it_was_made_from_is_refused(run: Path) -> None:
    manifest = run / "index" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["inputs"]["geolocator"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"index is old: it was made from geolocator None"):
        load_retriever(str(run))


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("geolocator/model.safetensors", "train"),
        ("index/calibration.json", "index"),
        ("geocells/geocells.csv", "geocells"),
        ("index/codes.bin", "index"),
        ("index/rows.parquet", "index"),
    ],
)
def test_one_flipped_bit_in_any_file_is_refused(run: Path, file: str, command: str) -> None:
    path = run / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged.*hedwig {command}"):
        load_retriever(str(run))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path.name} is missing.*hedwig {command}"):
        load_retriever(str(run))


def test_an_unfinished_or_missing_run_says_what_to_do(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="hedwig embed"):
        Hedwig.load(str(tmp_path / "elsewhere"))
    (run / "index" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="index is missing or unfinished; run `hedwig index`"):
        Hedwig.load(str(run))


def test_other_weights_than_the_references_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = storage.read_manifest(str(run / "embeddings"))
    assert manifest is not None
    changed = storage.Manifest(**{**vars(manifest), "details": {"model_id": "viclip-tiny@0123456789ab"}})
    monkeypatch.setattr("hedwig.retrieve.run.load_retriever", lambda run, **options: None)
    monkeypatch.setattr("hedwig.retrieve.run._manifest", lambda run, name: changed)
    with pytest.raises(
        ValueError, match="made by viclip-tiny@0123456789ab, but the weights there now are viclip-tiny@"
    ):
        Hedwig.load(str(run))
