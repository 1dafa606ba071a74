"""Judging answers: joined with the truth by id, beside floors and oracles, by place and by confidence, run against run.

`evaluate` makes the record of a run; `score_tables` scores two tables of anybody's; `compare_runs` sets runs side by
side on the queries that they share. Truth and predictions meet here and only here, by ``pano_id``, never by row order.
"""

from __future__ import annotations

from hedwig.evaluate.checks import sanity_checks, self_retrieval, shuffled_labels
from hedwig.evaluate.comparison import ComparedRun, compare_runs
from hedwig.evaluate.expected import expected_error, expected_error_on_rectangle
from hedwig.evaluate.floors import Embedded, best_constants, brute_force_1nn
from hedwig.evaluate.joining import join_predictions
from hedwig.evaluate.record import evaluate
from hedwig.evaluate.slices import is_urban, places_answered
from hedwig.evaluate.tables import join_answered, read_positions, score_tables

__all__ = [
    "ComparedRun",
    "Embedded",
    "best_constants",
    "brute_force_1nn",
    "compare_runs",
    "evaluate",
    "expected_error",
    "expected_error_on_rectangle",
    "is_urban",
    "join_answered",
    "join_predictions",
    "places_answered",
    "read_positions",
    "sanity_checks",
    "score_tables",
    "self_retrieval",
    "shuffled_labels",
]
