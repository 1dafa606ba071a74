import pytest

from hedwig import storage
from hedwig.cli.summary import stage_figures, summary_lines
from hedwig.config import validate_experiment
from hedwig.pipelines.measured import Meter, measured_record
from hedwig.pipelines.run import Run


def test_the_record_has_sums_per_stage_and_clock():
    meter = Meter()
    for _ in range(2):
        meter.add(
            {"rows": 4, "rejected": 1, "bytes_in": 100, "wall_s:Read": 0.5, "cpu_s:Read": 0.25, "wall_s:Embed": 2}
        )
    record = measured_record(meter.totals(), 10.0, 3)
    assert record == {
        "rows": 8, "rejected": 2, "bytes_in": 200, "seconds": 10.0, "workers": 3,
        "wall_s": {"Read": 1.0, "Embed": 4.0}, "cpu_s": {"Read": 0.5},
    }  # fmt: skip


def test_the_summary_says_where_the_workers_time_went(tmp_path):
    run = Run(validate_experiment({"output": str(tmp_path)}))
    run.made["embed"] = 12.0
    measured = measured_record({"rows": 60, "wall_s:Read": 2.0, "wall_s:Embed": 14.0}, 10.0, 2)
    storage.publish(
        run.folder("embed"), kind="embeddings", config={}, inputs={}, num_in=100, num_out=97, num_rejected=3,
        details={"measured": measured, "reused": 40},
    )  # fmt: skip
    figures = stage_figures(run)
    assert figures["embed"]["rows_per_s"] == 5.0  # of the rows of this run
    assert figures["embed"]["shares"] == pytest.approx({"Read": 0.1, "Embed": 0.7, "rest": 0.2})
    line = summary_lines(figures)[1]
    assert line.split()[:5] == ["embed", "12.0", "60", "5.0", "3"]
    assert line.endswith("Read 10%, Embed 70%, rest 20%; 40 rows taken over")
    assert summary_lines({}) == []
