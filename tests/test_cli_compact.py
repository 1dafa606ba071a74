import json

import pyarrow as pa
import typer
from typer.testing import CliRunner

from hedwig import storage
from hedwig.cli import compact


def test_the_command_says_how_many_files_there_were_and_are(tmp_path):
    for i in range(4):
        storage.write_table(str(tmp_path / f"part-{i}.parquet"), pa.table({"pano_id": [f"p{i}", f"q{i}"]}))
    storage.publish(str(tmp_path), kind="t", config={}, inputs={}, num_in=8, num_out=8)
    app = typer.Typer()
    compact.register(app)
    first = CliRunner().invoke(app, [str(tmp_path), "--rows-per-file", "5", "--json"])
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert (found["num_rows"], found["files_before"], found["files_after"]) == (8, 4, 2)
    again = CliRunner().invoke(app, [str(tmp_path), "--rows-per-file", "5"])
    assert "2 files of 8 rows, already few enough" in again.stdout
    assert storage.read_table(str(tmp_path))["pano_id"].to_pylist() == sorted(f"{a}{i}" for a in "pq" for i in range(4))
