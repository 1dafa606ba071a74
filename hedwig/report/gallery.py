"""The examples of the page: the panorama, the frames cut from it, where truth and answer lie, and the neighbours.

Best, typical and worst answers stand in the order of their error, each with its rank, so that nobody takes the best for
the rule. Pictures are data URIs in the page itself; all text is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from PIL import Image

from hedwig.report.content import Floats, ReportContent, column, plain
from hedwig.report.drawing import BLUE, COAST, INK, LAND, PALE, SEA, VERMILLION, new_figure, png_bytes
from hedwig.report.ground import clip_to, globe_patch, land_paths
from hedwig.report.sections import text
from hedwig.report.tables import number
from hedwig.report.view import fit_view, great_circles

__all__ = ["draw_example", "example_maps", "examples"]

MAP_IN = (3.6, 2.2)
AROUND_DEG = 3.0  # a map shows at least so much on every side of the truth: a dot on bare ground says nothing


def example_maps(content: ReportContent) -> list[bytes | None]:
    """A PNG per example, in the order of the gallery; None where truth or answer is unknown."""
    return [
        None if figure is None else png_bytes(figure, dpi=110, max_bytes=60_000)
        for figure in (draw_example(example, content.land) for example in content.gallery)
    ]


def draw_example(example: Mapping[str, Any], land: Sequence[Floats]) -> Figure | None:
    """Truth, answer, the great circle between them, and the neighbours, on a map without words.

    Args:
        example: ``truth, prediction`` ((lat, lon) in degrees) and ``neighbours`` (each with ``lat, lon``).
        land: country outlines, each (K, 2) of lat, lon.
    """
    ends = [_position(example.get("truth")), _position(example.get("prediction"))]
    if ends[0] is None or ends[1] is None:
        return None
    (lat, lon), (own_lat, own_lon) = ends[0], ends[1]
    near = [p for n in example.get("neighbours") or [] if (p := _position((n.get("lat"), n.get("lon")))) is not None]
    around = [(float(np.clip(lat + d, -89.0, 89.0)), lon) for d in (-AROUND_DEG, AROUND_DEG)]
    seen = np.array([(lat, lon), (own_lat, own_lon), *near, *around])
    view = fit_view(*seen.T)
    figure = new_figure(*MAP_IN)
    axes = figure.add_axes((0.005, 0.005, 0.99, 0.99), facecolor=SEA)
    left, right, bottom, top = view.extent
    spare = ((right - left) * MAP_IN[1] / MAP_IN[0] - (top - bottom)) / 2  # degrees are as long both ways
    axes.set_xlim(left - max(-spare, 0) * MAP_IN[0] / MAP_IN[1], right + max(-spare, 0) * MAP_IN[0] / MAP_IN[1])
    axes.set_ylim(bottom - max(spare, 0), top + max(spare, 0))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(PALE)
    clip = globe_patch(axes, view, SEA)
    shapes = PathCollection(land_paths(view, land), facecolors=LAND, edgecolors=COAST, linewidths=0.6, zorder=2)
    axes.add_collection(shapes, autolim=False)
    ways = great_circles(view, np.array([lat]), np.array([lon]), np.array([own_lat]), np.array([own_lon]))
    line = LineCollection([way for _, way in ways], colors=INK, linewidths=1.2, zorder=4)
    axes.add_collection(line, autolim=False)
    artists: list[Any] = [shapes, line]
    styles = [(near, BLUE, BLUE, 22), ([(own_lat, own_lon)], "white", INK, 46), ([(lat, lon)], VERMILLION, "white", 52)]
    for layer, (places, face, edge, size) in enumerate(styles):
        if places:
            x, y = view.points(*np.array(places).T).T
            artists.append(axes.scatter(x, y, s=size, c=face, edgecolors=edge, linewidths=1.2, zorder=5 + layer))
    for artist in artists:
        clip_to(artist, clip)
    return figure


def _position(value: Any) -> tuple[float, float] | None:
    value = plain(value)
    if not isinstance(value, list) or len(value) != 2 or None in value:
        return None
    return float(value[0]), float(value[1])


def examples(content: ReportContent, maps: Sequence[bytes | None], width_px: int, neighbour_px: int) -> str:
    """The examples: strip and frames, what was said of them, the map, and the neighbours that the answer rests on.

    Args:
        content: what to show.
        maps: what `example_maps` returns.
        width_px: of a strip and of the row of frames; 0 leaves pictures out.
        neighbour_px: of a neighbour's strip.
    """
    if not content.gallery:
        return ""
    errors = column(content.queries, "error_km")
    blocks = []
    for example, drawn in sorted(zip(content.gallery, maps, strict=True), key=lambda pair: _error_or_last(pair[0])):
        name = text(str(example.get("pano_id", "")))
        strip = _strip(example.get("strip"), width_px, f"panorama {example.get('pano_id', '')}")
        strip += _frames(example.get("frames"), width_px, name)
        near = "".join(_neighbour(n, neighbour_px) for n in example.get("neighbours") or [])
        near = f'<p class="quiet">nearest references</p><ul class="near">{near}</ul>' if near else ""
        where = _map(drawn) if drawn is not None and width_px else ""
        caption = example.get("caption")
        blocks.append(
            f'<article class="example"><h3>{_rank(example, errors)}</h3><div>{strip}'
            f'<p class="quiet"><code>{name}</code>{f" · “{text(str(caption))}”" if caption else ""}</p></div>'
            f"<div><dl><dt>truth</dt><dd>{_place(example.get('truth'))}</dd>"
            f"<dt>answer</dt><dd>{_place(example.get('prediction'))}</dd></dl>"
            f"{where}{near}</div></article>"
        )
    return f"<h2>Examples, from the best to the worst</h2>{''.join(blocks)}"


def _error_or_last(example: Mapping[str, Any]) -> float:
    error = plain(example.get("error_km"))
    return float("inf") if error is None else float(error)


def _rank(example: Mapping[str, Any], errors: Floats) -> str:
    """How far off an example is, and its rank among the queries."""
    error = plain(example.get("error_km"))
    kind = f"{text(str(example['kind']).capitalize())}: " if example.get("kind") else ""
    if error is None:
        return f"{kind}error unknown"
    errors = errors[np.isfinite(errors)]
    # half a metre of tolerance: the example's error may have gone through text
    rank = int(np.sum(errors < float(error) - 5e-4)) + 1
    place = f' <span class="quiet">rank {rank:,} of {len(errors):,} queries</span>' if len(errors) else ""
    return f"{kind}{text(number(float(error)))} km off{place}"


def _neighbour(neighbour: Mapping[str, Any], width_px: int) -> str:
    name = str(neighbour.get("pano_id", ""))
    place = _place((neighbour.get("lat"), neighbour.get("lon")))
    score = neighbour.get("score")
    return (
        f"<li>{_strip(neighbour.get('strip'), width_px, f'neighbour {name}')}<span><code>{text(name)}</code><br>{place}"
        f"{f' · {text(number(score))}' if score is not None else ''}</span></li>"
    )


def _strip(pixels: Any, width_px: int, alt: str) -> str:
    """(H, W, 3) uint8 as a JPEG no wider than `width_px`; a frame with words where there is none."""
    if pixels is None or width_px == 0 or np.ndim(pixels) != 3 or 0 in np.shape(pixels):
        return '<span class="none">no picture</span>'
    return f'<img class="strip" alt="{text(alt)}" src="{_jpeg(pixels, width_px)}">'


def _frames(frames: Any, width_px: int, name: str) -> str:
    """(V, S, S, 3) uint8 side by side; nothing where there are none."""
    if frames is None or width_px == 0 or np.ndim(frames) != 4 or 0 in np.shape(frames):
        return ""
    gap = np.full((frames.shape[1], max(1, frames.shape[2] // 24), 3), 255, dtype=np.uint8)
    row = np.concatenate([part for frame in frames for part in (frame, gap)][:-1], axis=1)
    return f'<img class="frames" alt="the {len(frames)} frames cut from {name}" src="{_jpeg(row, width_px)}">'


def _jpeg(pixels: Any, width_px: int) -> str:
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8)).convert("RGB")
    if image.width > width_px:
        image = image.resize((width_px, max(1, round(image.height * width_px / image.width))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _map(png: bytes) -> str:
    alt = "map of the true place, the answer and the neighbours"
    key = "<b>●</b> truth, ○ answer, <i>●</i> neighbours"
    data = base64.b64encode(png).decode()
    image = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    return f'<figure class="where">{image}<figcaption>{key}</figcaption></figure>'


def _place(position: Any) -> str:
    """A position in degrees with its hemispheres."""
    place = _position(position)
    if place is None:
        return "–"
    lat, lon = place
    return f"{abs(lat):.4f}° {'N' if lat >= 0 else 'S'}, {abs(lon):.4f}° {'E' if lon >= 0 else 'W'}"
