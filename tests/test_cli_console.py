import time

from hedwig.cli.console import Progress, console


def test_a_line_has_rate_rejected_rows_and_what_is_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console, "quiet", False)
    progress = Progress()
    progress("embed", 1000, 10_000)  # a run that goes on: what was there before is no part of its rate
    now[0] += 10
    progress("embed", 1500, 10_000, 3)
    assert capsys.readouterr().err == "embed     1500/10000 (15%) 50.0/s, 3 rejected, 0:02:50 left\n"
    now[0] += 1
    progress("embed", 1600, 10_000, 3)
    assert capsys.readouterr().err == ""  # at most one line in ten seconds
    now[0] += 9
    progress("embed", 10_000, 10_000, 3)
    assert capsys.readouterr().err == "embed     10000/10000 (100%) 450.0/s, 3 rejected\n"
