"""Run every experiment of a matrix, nothing twice, and print the paper's tables of them.

Each experiment is a run like any other, in a folder of its own. What an earlier one has made of the same settings and
inputs is taken over by its manifest's fingerprint, so panoramas are split once, captions written once per caption axis
and embeddings made once per encoder. Killed, the same command goes on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from hedwig import storage
from hedwig.config import Matrix
from hedwig.pipelines.experiment import run_experiment
from hedwig.pipelines.run import STAGE_FOLDERS
from hedwig.report.paper import PaperTable, Scored, paper_table, to_csv, to_html, to_text

__all__ = ["run_matrix"]

logger = logging.getLogger(__name__)


def run_matrix(matrix: Matrix, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Run what is not up to date, and write ``tables.txt``, ``tables.html`` and ``table-N.csv`` into the output.

    Args:
        matrix: the experiments.
        progress: called with (stage, rows done, rows in all).

    Returns:
        ``tables`` (number -> title, header and rows), ``text``, ``runs`` (folder, labels, stages made and shared).

    Raises:
        ValueError: a run has no scored queries.
    """
    scored: list[Scored] = []
    runs: list[dict[str, Any]] = []
    done: list[str] = []
    for number, cell in enumerate(matrix.cells, start=1):
        logger.info("experiment %d of %d: %s", number, len(matrix.cells), cell.name)
        run = run_experiment(cell.experiment, progress=progress, siblings=done)
        done.append(cell.experiment.output)
        scored.append(_scored(cell.experiment.output, cell.labels))
        runs.append(
            {"output": cell.experiment.output, "labels": cell.labels, "made": list(run.made), "shared": run.resumed}
        )
    tables = {number: paper_table(number, scored) for number in matrix.tables}
    text = "\n\n".join(to_text(table) for table in tables.values())
    folder = storage.resolve(matrix.output)
    storage.write_bytes(storage.join(folder, "tables.txt"), (text + "\n").encode())
    page = to_html(list(tables.values()), matrix.name, [_queries(scored)])
    storage.write_bytes(storage.join(folder, "tables.html"), page.encode())
    for number, table in tables.items():
        storage.write_bytes(storage.join(folder, f"table-{number}.csv"), to_csv(table).encode())
    return {"tables": {number: _plain(table) for number, table in tables.items()}, "text": text, "runs": runs}


def _plain(table: PaperTable) -> dict[str, Any]:
    return {"title": table.title, "header": table.header, "rows": table.rows, "num_rows": table.num_rows}


def _scored(output: str, labels: dict[str, str]) -> Scored:
    path = storage.join(storage.resolve(output), STAGE_FOLDERS["evaluate"], "report.json")
    record = json.loads(storage.read_bytes(path))
    evaluation = record.get("evaluation")
    if not evaluation:
        raise ValueError(f"{output} has no scored queries: its test split holds no panorama with a position.")
    synthetic = "SYNTHETIC world, " if record.get("synthetic") else ""
    note = f"{synthetic}{evaluation['num_queries']} queries, encoder {record['encoder_note']}"
    return Scored(labels, record["methods"], note, evaluation.get("expected_error"))


def _queries(scored: list[Scored]) -> str:
    counts = sorted({int(run.methods["hedwig"]["num_queries"]) for run in scored})
    told = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Great-circle errors of {told} held-out queries; floors answer without looking at any picture."
