"""The end of ``hedwig run``: where the time went, stage by stage, from the manifests of what was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hedwig.pipelines import Run

__all__ = ["stage_figures", "summary_lines"]


def stage_figures(run: Run) -> dict[str, dict[str, Any]]:
    """Stage -> seconds, rows, rows/s, rejected rows, and the share of the workers' time in each step, where measured.

    Only stages that this run made are told. ``shares`` add up to 1: ``rest`` is what the workers were not busy with
    (starting, waiting for blocks, writing).
    """
    from hedwig import storage

    figures: dict[str, dict[str, Any]] = {}
    for stage, seconds in run.made.items():
        manifest = storage.read_manifest(run.folder(stage))
        if manifest is None:
            continue
        measured: dict[str, Any] = manifest.details.get("measured", {})
        rows = int(measured.get("rows", manifest.num_in))
        one: dict[str, Any] = {"seconds": seconds, "rows": rows, "rejected": manifest.num_rejected}
        one["rows_per_s"] = rows / seconds if seconds else None
        if "reused" in manifest.details:
            one["reused"] = manifest.details["reused"]
        busy: dict[str, float] = measured.get("wall_s", {})
        whole = float(measured.get("seconds", 0.0)) * int(measured.get("workers", 1))
        if busy and whole > 0:
            shares = {step: spent / whole for step, spent in busy.items()}
            one["shares"] = {**shares, "rest": max(0.0, 1 - sum(shares.values()))}
        figures[stage] = one
    return figures


def summary_lines(figures: dict[str, dict[str, Any]]) -> list[str]:
    """The figures as lines of a table."""
    if not figures:
        return []
    lines = [f"{'stage':<10} {'seconds':>9} {'rows':>9} {'rows/s':>9} {'rejected':>9}  where the workers' time went"]
    for stage, one in figures.items():
        rate = "-" if one["rows_per_s"] is None else f"{one['rows_per_s']:.1f}"
        where = ", ".join(f"{step} {share:.0%}" for step, share in one.get("shares", {}).items())
        if one.get("reused"):
            where += f"{'; ' if where else ''}{one['reused']} rows taken over"
        lines.append(f"{stage:<10} {one['seconds']:>9.1f} {one['rows']:>9} {rate:>9} {one['rejected']:>9}  {where}")
    return lines
