"""The line of progress: an estimate of the time left only where progress is even in time."""

import re

from augdistill_report.work import progress


def test_uneven_progress_says_the_time_so_far(capsys, monkeypatch):
    now = iter(range(0, 1000, 100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    line = progress.Line()
    line.count("notebooks", 2, 8, "03, cell 4 of 9", even=False)
    said = capsys.readouterr().err
    assert re.fullmatch(r"2.0 of 8 notebooks, \d+ s so far \| 03, cell 4 of 9\n", said)
    line.count("experts", 2, 8)
    assert re.fullmatch(r"2.0 of 8 experts, about (\d+) s left\n", said := capsys.readouterr().err)
    line.count("experts", 0, 8)
    assert capsys.readouterr().err == "0.0 of 8 experts\n"  # nothing is known yet
