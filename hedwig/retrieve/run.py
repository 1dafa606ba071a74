"""A finished run as something to ask: `Hedwig` for people, `Predictor` for tables.

Both read artefacts, never the experiment, and refuse a folder whose parts do not belong together: a stale index
answers confidently and wrong. A query goes through the very stages that made the references. Only pixels count:
file names, Exif positions and dates never reach a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hedwig import storage
from hedwig.geocells import Geocells
from hedwig.index import INDEX_FILES, GeocellIndex, References, check_digest
from hedwig.index.fetching import local_index
from hedwig.models.geolocator import Geolocator
from hedwig.panorama import Slicing
from hedwig.publishing import published_folder
from hedwig.retrieve.answer import neighbours_of, predictions_of
from hedwig.retrieve.calibration import CALIBRATION_FILE, Calibration
from hedwig.retrieve.encoder import load_embedder
from hedwig.retrieve.evidence import log_softmax
from hedwig.retrieve.halves import in_halves
from hedwig.retrieve.prediction import Prediction
from hedwig.retrieve.prototypes import Prototypes
from hedwig.retrieve.query import Query, make_query
from hedwig.retrieve.retriever import Retriever
from hedwig.retrieve.whitening import Whitening

__all__ = ["Hedwig", "Predictor", "load_retriever"]

Stage = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]
OpenIndex = Callable[[Path, Mapping[str, str]], References]
_COMMANDS = {"embeddings": "embed", "geocells": "geocells run", "geolocator": "train", "index": "index"}
_EMBEDDED = ("image_embedding", "text_embedding", "frame_embeddings")
_BATCH = 32


def load_retriever(run: str, *, device: str = "cpu", open_index: OpenIndex | None = None, **knobs: Any) -> Retriever:
    """The retriever of a run folder, after checking that its parts belong together.

    Args:
        run: local folder, s3:// or gs://, with ``geocells``, ``geolocator``, ``embeddings`` and ``index``.
        device: where the geolocator computes; "auto" takes CUDA where there is one.
        open_index: opens a local folder, given the digests of its files, whose vectors may be missing where the run is
            on object storage; `GeocellIndex.open`, which has them, when None.
        knobs: keyword arguments of `Retriever`, over those that the run recorded with its predictions (or, before
            there are any, with its index).

    Raises:
        FileNotFoundError: an artefact is missing.
        ValueError: a file is damaged, or an artefact was made from another one than is there.
    """
    manifests = _checked_manifests(run)
    settings = {**_recorded_knobs(run, manifests["index"]), "embedding": manifests["index"].config["embedding"]}
    with storage.local_copy(storage.join(run, "geocells")) as folder:
        _check_files(folder, manifests["geocells"], "geocells")
        cells = Geocells.load(folder).table
    with storage.local_copy(storage.join(run, "geolocator")) as folder:
        _check_files(folder, manifests["geolocator"], "geolocator")
        geolocator = in_halves(Geolocator.load(folder, device=_device(device)))
    with _index_folder(run, whole=open_index is None) as folder:
        _check_files(folder, manifests["index"], "index", but=INDEX_FILES)
        index = (open_index or GeocellIndex.open)(folder, manifests["index"].files)
        settings = {"cell_radius_km": cells["radius_km"], **settings, **knobs}
        if (folder / CALIBRATION_FILE).is_file():
            settings.setdefault("calibration", Calibration.load(folder / CALIBRATION_FILE))
        if settings["embedding"] == "whitened":
            settings["whitening"] = Whitening.load(folder)
        if settings.get("refine") == "prototype":
            settings["prototypes"] = Prototypes.load(folder)
    return Retriever(geolocator, index, cells["lat"], cells["lon"], **settings)


class Predictor:
    """The retriever of a run folder as a stage that plain arguments can build, as an actor needs it.

    Args:
        run: the run folder.
        device: where the geolocator computes.
        knobs: see `load_retriever`.
    """

    reads: tuple[str, ...] = Retriever.reads
    reads_if_there: tuple[str, ...] = Retriever.reads_if_there
    writes: tuple[str, ...] = Retriever.writes

    def __init__(self, *, run: str, device: str = "cpu", **knobs: Any) -> None:
        self.retriever = load_retriever(run, device=device, **knobs)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch with the prediction's columns; see `Retriever`."""
        return self.retriever(batch)


class Hedwig:
    """A finished run, ready to be asked: images in, predictions out.

    Args:
        retriever: cells, neighbours, answer.
        slicing: how the references were cut; queries are cut alike.
        embedder: the stage that made the references' embeddings.
        captioner: the stage that made their captions; None where there were none.
    """

    def __init__(
        self, retriever: Retriever, *, slicing: Slicing, embedder: Stage, captioner: Stage | None = None
    ) -> None:
        self.retriever, self.slicing = retriever, slicing
        self.embedder, self.captioner = embedder, captioner

    @classmethod
    def load(
        cls,
        run: str,
        *,
        device: str = "cpu",
        encoder: Callable[[str, storage.Manifest], Any] | None = None,
        open_index: OpenIndex | None = None,
    ) -> Hedwig:
        """Open the run folder that `hedwig run` wrote, local, s3:// or gs://; of one that is published, that version.

        Args:
            run: the run folder.
            device: where it computes.
            encoder: makes the embedder of a version's folder and the manifest of its embeddings; `load_embedder` when
                None.
            open_index: see `load_retriever`.

        Raises:
            FileNotFoundError: an artefact is missing.
            ValueError: artefacts that are damaged or do not belong together; says which one is old and what to run.
        """
        run = published_folder(run)
        retriever = load_retriever(run, device=device, open_index=open_index)
        manifest = _manifest(run, "embeddings")
        embedder = load_embedder(run, manifest, device=device) if encoder is None else encoder(run, manifest)
        captioner: Stage | None = None
        if manifest.config.get("captions", {}).get("source", "none") == "template":
            from hedwig.captions import TemplateCaptioner, captioner_options

            captioner = TemplateCaptioner(**captioner_options(manifest.config["slicing"]))
        slicing = Slicing(**{"frame_px": embedder.encoder.frame_px, **manifest.config["slicing"]})
        return cls(retriever, slicing=slicing, embedder=embedder, captioner=captioner)

    def locate(
        self,
        image: Any,
        top_k: int = 5,
        heading: float = math.nan,
        captured_at: str | None = None,
        *,
        projection: str | None = None,
        bearings_deg: Sequence[float] | None = None,
    ) -> Prediction:
        """Where was this taken?

        Args:
            image: path or URI, bytes of a JPEG, PNG or WebP, PIL image, (H, W, 3) uint8 array, or a list of such: one
                panorama as several photographs.
            top_k: cells and neighbours to list.
            heading: degrees clockwise from true north of the image's centre column, if known.
            captured_at: ISO date, if known; goes into the caption.
            projection: None to tell from the shape: 2:1 is equirectangular, wider is a frame strip, else perspective.
            bearings_deg: of a list, each centre's heading; None for evenly spaced, clockwise from the first.

        Raises:
            FileNotFoundError: there is no such image.
            ValueError: it cannot be decoded or sliced.
        """
        query = self.query(
            image, heading=heading, captured_at=captured_at, projection=projection, bearings_deg=bearings_deg
        )
        return self.answer([query], self.embed([query]), top_k=top_k)[0]

    def locate_many(self, images: Sequence[Any], top_k: int = 5) -> list[Prediction]:
        """`locate` for many images of unknown heading, encoded in batches; an item may itself be a list."""
        found: list[Prediction] = []
        for start in range(0, len(images), _BATCH):
            some = [self.query(image) for image in images[start : start + _BATCH]]
            found += self.answer(some, self.embed(some), top_k=top_k)
        return found

    @property
    def dim(self) -> int:
        """D, the length of an image embedding."""
        return int(self.retriever.geolocator.config.image_dim)

    @property
    def cell_places(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(C,) latitudes and (C,) longitudes of the geocells, in degrees."""
        return self.retriever.cell_lat, self.retriever.cell_lon

    @property
    def searches_here(self) -> bool:
        """Whether a search stays in this process; else it takes a thread, which may wait for others."""
        return isinstance(self.retriever.index, GeocellIndex)

    @property
    def half_size(self) -> bool:
        """Whether JPEGs are decoded at half size."""
        return self.slicing.half_size

    def query(
        self,
        image: Any,
        *,
        heading: float = math.nan,
        captured_at: str | None = None,
        projection: str | None = None,
        bearings_deg: Sequence[float] | None = None,
    ) -> Query:
        """The first step of `locate`, which explains the arguments: decode and cut."""
        return make_query(
            image,
            self.slicing,
            heading=heading,
            captured_at=captured_at,
            projection=projection,
            bearings_deg=bearings_deg,
        )

    def embed(self, queries: Sequence[Query]) -> dict[str, NDArray[Any]]:
        """The second step, for B queries at once.

        Returns:
            ``image_embedding`` (B, Di), ``text_embedding`` (B, Dt), and, where the run keeps them,
            ``frame_embeddings`` (B, V·Di).

        Raises:
            ValueError: a query that cannot be embedded.
        """
        nothing = np.full(len(queries), None, dtype=object)
        batch: dict[str, NDArray[Any]] = {
            "pano_id": np.array([q.pano_id for q in queries], dtype=object),
            "lat": np.full(len(queries), np.nan),
            "lon": np.full(len(queries), np.nan),
            "heading": np.array([q.heading for q in queries], dtype=np.float64),
            "projection": np.array([q.projection for q in queries], dtype=object),
            "captured_at": np.array([q.captured_at for q in queries], dtype=object),
            "country": nothing,
            "sequence": nothing,
            "caption": nothing,
            "frames": np.stack([q.frames for q in queries]),
        }
        for stage in (self.captioner, self.embedder):
            if stage is not None:
                batch = stage(batch)
                if reasons := [r for r in batch.pop("failure", nothing).tolist() if r is not None]:
                    raise ValueError(f"{len(reasons)} of {len(queries)} images failed: {reasons[0]}.")
        return {name: batch[name] for name in _EMBEDDED if name in batch}

    def answer(
        self,
        queries: Sequence[Query],
        embedded: Mapping[str, NDArray[Any]],
        *,
        top_k: int | None = 5,
        regions: bool | None = None,
        posterior_above: float | None = None,
    ) -> list[Prediction]:
        """The last step: cells, neighbours, answer.

        Args:
            queries: B of them.
            embedded: what `embed` made of them.
            top_k: cells and neighbours to list.
            regions: list the 50 % and 90 % regions; None as the run has it.
            posterior_above: list all cells of at least this probability; None lists none.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        asked = self.retriever
        found = asked.evidence(*self._encoded(embedded), num_queries=len(queries), top_k=top_k)
        predictions = predictions_of(
            asked,
            found,
            [query.pano_id for query in queries],
            top_k=top_k,
            regions=asked.regions if regions is None else regions,
            posterior_above=posterior_above,
        )
        return [query.seen(prediction) for query, prediction in zip(queries, predictions, strict=True)]

    def explain(
        self, queries: Sequence[Query], embedded: Mapping[str, NDArray[Any]], predictions: Sequence[Prediction]
    ) -> list[Prediction]:
        """The predictions with a weight for every frame: how far this frame alone leads to the answer's cell.

        Each frame is encoded on its own, which takes as long as the answer did (measured: 0.96 times), and the
        geolocator is asked with it in place of the panorama; leaving out one after another of 8 takes 7.7 times.
        """
        explained = []
        for b, (query, prediction) in enumerate(zip(queries, predictions, strict=True)):
            each = self.embedder.encoder.encode_each_frame(query.frames[None])[0]  # type: ignore[attr-defined]
            alone: dict[str, NDArray[Any]] = {
                "image_embedding": each,
                "text_embedding": np.repeat(embedded["text_embedding"][b : b + 1], len(each), axis=0),
            }
            if "frame_embeddings" in embedded:
                alone["frame_embeddings"] = np.tile(each, (1, len(each)))
            log_probs = log_softmax(self._encoded(alone)[1].astype(np.float64))
            cell = prediction.cell_ids[0] if prediction.cell_id is None else prediction.cell_id
            explained.append(query.seen(prediction, log_probs[:, cell]))
        return explained

    def neighbours(
        self, embedded: Mapping[str, NDArray[Any]], top_k: int = 5, *, cells: NDArray[Any] | None = None
    ) -> dict[str, list[Any]]:
        """The search alone, for B embeddings, stored ones or fresh; without captions ``text_embedding`` may be absent.

        Returns:
            ``cell_ids`` (B, K) that were searched, and for each query lists of at most `top_k` ``neighbour_ids,
            neighbour_scores, neighbour_lat, neighbour_lon``, best first.

        Raises:
            ValueError: vectors of another width, or cells that there are not.
        """
        asked = self.retriever
        return neighbours_of(asked, *asked.neighbours(*self._encoded(embedded), top_k, cells=cells))

    def _encoded(self, embedded: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        image, text = embedded["image_embedding"], embedded.get("text_embedding")
        if text is None:  # zeros are what an embedder makes of no caption
            text = np.zeros((len(image), self.retriever.geolocator.config.text_dim), dtype=np.float32)
        return self.retriever.encode(image, text, frames=embedded.get("frame_embeddings"))


@contextmanager
def _index_folder(run: str, *, whole: bool) -> Iterator[Path]:
    """The run's index as a local folder; not whole: without vectors where they would have to be fetched."""
    folder = storage.join(run, "index")
    if whole:
        with storage.local_copy(folder) as path:
            yield path
    else:
        with local_index(folder) as (path, _):
            yield path


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _manifest(run: str, name: str) -> storage.Manifest:
    folder = storage.join(run, name)
    manifest = storage.read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder} is missing or unfinished; run `hedwig {_COMMANDS[name]}` first.")
    return manifest


def _checked_manifests(run: str) -> dict[str, storage.Manifest]:
    """The manifests a retriever needs, each naming as its inputs exactly the artefacts that are there now."""
    manifests = {name: _manifest(run, name) for name in _COMMANDS}
    digests = {name: storage.manifest_digest(storage.join(run, name)) for name in _COMMANDS}
    for name, manifest in manifests.items():
        needed = ("embeddings", "geocells", "geolocator") if name == "index" else ()
        for source in dict.fromkeys([*needed, *manifest.inputs]):
            if source in digests and manifest.inputs.get(source) != digests[source]:
                raise ValueError(
                    f"{storage.join(run, name)} is old: it was made from {source} "
                    f"{str(manifest.inputs.get(source))[:12]}, and {source} there now is {digests[source][:12]}; "
                    f"run `hedwig {_COMMANDS[name]}` again."
                )
    return manifests


def _recorded_knobs(run: str, index: storage.Manifest) -> dict[str, Any]:
    """What the predictions were made with; those of another index are about to be replaced and do not count."""
    predictions = storage.read_manifest(storage.join(run, "predictions"))
    if predictions is not None and predictions.inputs.get("index") == storage.manifest_digest(
        storage.join(run, "index")
    ):
        index = predictions
    return dict(index.config.get("retrieve", {}))


def _check_files(folder: Path, manifest: storage.Manifest, name: str, but: tuple[str, ...] = ()) -> None:
    for file, digest in manifest.files.items():
        if file in but:
            continue
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; run `hedwig {_COMMANDS[name]}` again.")
        check_digest(folder / file, digest, f"run `hedwig {_COMMANDS[name]}` again")
