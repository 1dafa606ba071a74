"""The paper's tables in their own shape, number by number."""

import csv
import io

from hedwig.report.paper import Scored, paper_table, to_csv, to_html, to_text


def method(scale):
    return {
        "mean_km": 1541.55 * scale, "q1_km": 100.0 * scale, "median_km": 1309.64 * scale, "q3_km": 2000.0 * scale,
        "std_km": 1038.8 * scale, "num_queries": 50,
        "accuracy_at_km": {k: v / scale for k, v in {
            "1": 0.00007, "25": 0.01, "200": 0.02, "750": 0.08, "2500": 0.26, "10": 0.001, "100": 0.0075,
            "500": 0.119, "1000": 0.364, "5000": 0.9931, "10000": 1.0,
        }.items()},
    }  # fmt: skip


RUNS = [
    Scored(
        {"Model": "CLIP", "Captions": "Basic"}, {"hedwig": method(2), "viclip_1nn": method(4), "random": method(8)}, "x"
    ),
    Scored({"Model": "ViCLIP", "Captions": "<b>"}, {"hedwig": method(1), "viclip_1nn": method(2)}, "y"),
]


def test_table_3_has_base_and_tuned_rows_and_a_floor():
    table = paper_table(3, RUNS)
    assert table.header[:3] == ["Model", "Captions", "Base Model/Fine Tuned Model"]
    assert table.rows[3] == ["ViCLIP", "<b>", "Fine Tuned Model", "1,541.55", "1,309.64", "1,038.80"]
    assert [row[2] for row in table.rows[:4]] == ["Base Model", "Fine Tuned Model"] * 2
    assert table.num_rows == 4
    assert table.rows[4][0] == "random training place"


def test_table_4_is_in_percent_and_its_csv_parses_back():
    table = paper_table(4, RUNS)
    rows = list(csv.reader(io.StringIO(to_csv(table))))
    assert rows[0][3:] == [f"Under {km} km (%)" for km in (10, 100, 500, 1000, 5000, 10000)]
    assert [float(x) for x in rows[4][3:]] == [0.1, 0.75, 11.9, 36.4, 99.31, 100.0]


def test_table_1_says_who_is_better_and_when_nobody_is():
    table = paper_table(1, RUNS)
    rows = {row[0]: row for row in table.rows}
    assert rows["Median"][1:4] == ["2,619.28", "1,309.64", "ViCLIP · <b>"]
    assert rows["% below 2500 km"][1:4] == ["13.0000%", "26.0000%", "ViCLIP · <b>"]
    equal = paper_table(1, [RUNS[0], Scored({"Model": "again"}, RUNS[0].methods, "")])
    assert {row[3] for row in equal.rows} == {"Equal"}


def test_text_lines_up_and_html_escapes():
    text = to_text(paper_table(3, RUNS))
    lines = text.splitlines()
    assert len({len(line) for line in lines[1:8] if line}) <= 2
    assert lines[2] == lines[7]  # the rule above the rows and the one above the floor
    page = to_html([paper_table(3, RUNS)], "t", ["r"])
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_the_expected_error_of_a_guess_stands_below_tables_3_and_4_with_its_standard_error():
    expected = {**method(1), "mean_km": 1862.9, "standard_error_km": 0.87, "num_pairs": 1_000_000}
    runs = [Scored(RUNS[0].labels, RUNS[0].methods, "x", expected), RUNS[1]]
    for number, last in ((3, ["1,862.90", "1,309.64", "1,038.80"]), (4, ["0.10", "0.75"])):
        table = paper_table(number, runs)
        assert table.num_rows == 4
        assert table.rows[-1][:3] == ["expected error of a random guess (Monte Carlo)", "", ""]
        assert table.rows[-1][3 : 3 + len(last)] == last
        assert "mean 1,862.9 km, standard error 0.9 km, of 1,000,000 pairs" in to_text(table)
    assert len(paper_table(1, runs).rows[0]) == len(paper_table(1, RUNS).rows[0])
