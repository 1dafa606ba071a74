"""Small pieces that the tests of the service share, in memory and running."""

import math
import socket
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(url, server, timeout_s):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server ended: {server.stderr.read()}"
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.3)
    raise AssertionError(f"{url} was not ready within {timeout_s} s")


class FakePrediction(dict):
    def to_dict(self):
        return dict(self)


class FakeLocator:
    """Locates by the mean of the pixels; knows three references, and keeps what it was asked."""

    half_size, dim, searches_here = False, 4, True
    cell_places = (np.array([10.0, 50.0, 50.1]), np.array([20.0, 8.0, 8.1]))
    names = ("a", "b", "c")

    def __init__(self, name="fake"):
        self.name, self.queries, self.answered, self.searched = name, [], [], []

    def query(self, image, *, heading=math.nan, bearings_deg=None):
        several = isinstance(image, list)
        self.queries.append((len(image) if several else image.shape, heading, bearings_deg))
        mean = float(np.mean([one.mean() for one in image])) if several else float(image.mean())
        return SimpleNamespace(pano_id=f"{self.name}-{mean:.3f}", mean=mean)

    def embed(self, queries):
        image = np.array([[query.mean, 1.0, 0.0, 0.0] for query in queries], dtype=np.float32)
        return {"image_embedding": image, "text_embedding": np.zeros((len(queries), 2), dtype=np.float32)}

    def answer(self, queries, embedded, *, top_k=5, regions=None, posterior_above=None):
        self.answered.append((len(queries), top_k))
        found = []
        for row, query in zip(embedded["image_embedding"], queries, strict=True):
            if row[0] > 250:
                raise ValueError("Too bright.")
            found.append(
                FakePrediction(
                    pano_id=query.pano_id,
                    lat=float(row[0]) / 3,
                    lon=-1.5,
                    cell_ids=list(range(top_k)),
                    cell_probs=[1.0 / top_k] * top_k,
                    cell_lat=[10.0] * top_k,
                    cell_lon=[20.0] * top_k,
                    neighbour_ids=["a"],
                    neighbour_scores=[0.5],
                    neighbour_lat=[1.0],
                    neighbour_lon=[math.nan],
                    radius_km=math.nan,
                    radius_50_km=None,
                    confidence=0.5,
                    localisable=True,
                    entropy_bits=1.5,
                    region_50=[0] if regions else [],
                    region_90=[0, 1] if regions else [],
                    frames=[{"heading_deg": None, "fov_deg": None, "x0": 0.0, "x1": 0.5}],
                    posterior=None if posterior_above is None else {"cell_ids": [0, 1], "probs": [0.75, 0.25]},
                )
            )
        return found

    def explain(self, queries, embedded, predictions):
        frame = {"heading_deg": None, "fov_deg": None, "x0": 0.0, "x1": 0.5, "weight": 1.0, "probability": 0.25}
        return [FakePrediction({**prediction, "frames": [frame]}) for prediction in predictions]

    def neighbours(self, embedded, top_k=5, *, cells=None):
        vectors = embedded["image_embedding"]
        if cells is not None and (cells >= 3).any():
            raise ValueError("cells must lie in -1..2.")
        self.searched.append((vectors.copy(), top_k, cells))
        names = list(self.names[:top_k])
        return {
            "cell_ids": [[0, 1]] * len(vectors) if cells is None else cells.tolist(),
            "neighbour_ids": [names] * len(vectors),
            "neighbour_scores": [[float(row[0])] * len(names) for row in vectors],
            "neighbour_lat": [[1.0] * len(names)] * len(vectors),
            "neighbour_lon": [[2.0] * len(names)] * len(vectors),
        }
