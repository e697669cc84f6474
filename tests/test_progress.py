"""Promises of what a person sees while a verb works."""

from __future__ import annotations

from cpcscale import progress


def test_the_time_left_follows_the_speed_of_late_and_not_what_was_done_before(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = progress.Progress("packing", 1000, "shards")
    # A hundred are found done at once, then each takes a minute.
    for done in range(1, 200):
        clock[0] += 60 if done > 100 else 0
        bar.update(done)
    assert capsys.readouterr().err.splitlines()[-1] == "packing: 199/1000 shards, about 13 h 21 min left"
    assert [progress.duration(seconds) for seconds in (0.4, 89, 90, 5340, 36_000)] == [
        "0 s",
        "89 s",
        "2 min",
        "89 min",
        "10 h 00 min",
    ]
