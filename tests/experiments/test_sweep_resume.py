"""A sweep that goes on after a stop or a kill: what was tried stays tried, and is tracked once."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from commands import long
from hypothesis import given
from hypothesis import strategies as st
from made_voices import put_corpus
from sweeps import family, settings

from cpcscale import storage
from cpcscale.cluster import session
from cpcscale.errors import UserError
from cpcscale.experiments.finetune import finished_result
from cpcscale.experiments.sweep.journal import Journal, TrialRecord
from cpcscale.experiments.sweep.run import _finished, sweep
from cpcscale.experiments.sweep.schedule import TrialSchedule
from cpcscale.experiments.sweep.space import SearchDimension
from cpcscale.experiments.sweep.suggest import suggest
from cpcscale.experiments.sweep.tracked_trials import TrackedTrials
from cpcscale.experiments.sweep.tune import make_scheduler
from cpcscale.runs.lease import HeldError, LeaseConfig, hold
from cpcscale.signals import handlers_restored
from cpcscale.tracking import run_note
from cpcscale.tracking.about import About
from cpcscale.tracking.outbox import always
from cpcscale.tracking.tracker import Tracker

FORMS = [
    SearchDimension("fit.activation_weight", "uniform", (0.2, 0.5)),
    SearchDimension("fit.batch", "choice", (8, 16, 32)),
    SearchDimension("fit.learning_rate", "loguniform", (1e-4, 1e-2)),
    SearchDimension("recogniser.dense", "randint", (8, 12)),
    SearchDimension("recogniser.dropout", "quniform", (0.0, 0.6, 0.1)),
]


def is_drawn_from(dimension: SearchDimension, value) -> bool:
    arguments = dimension.arguments
    match dimension.form:
        case "choice":
            return value in arguments
        case "randint":
            return isinstance(value, int) and arguments[0] <= value < arguments[1]
        case "quniform":
            return value in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
        case _:
            return arguments[0] <= value <= arguments[1]


def record(number: int, score: float, status: str = "finished", **values) -> TrialRecord:
    drawn = suggest(FORMS, "random", 0, number, []) | values
    reports = [{"epoch": epoch, "inner_ccc": score, "seconds": 1.0, "folds": []} for epoch in (1, 2)]
    return TrialRecord(number, drawn, status, [] if status == "running" else reports)


@given(search=st.sampled_from(["random", "optuna"]), seed=st.integers(0, 2**31), number=st.integers(0, 10**6))
def test_every_value_is_one_that_its_form_can_draw(search, seed, number):
    known = [record(each, each / 20, ("finished", "stopped", "failed", "running")[each % 4]) for each in range(12)]
    values = suggest(FORMS, search, seed, number, known)
    assert list(values) == [each.key for each in FORMS]
    assert all(is_drawn_from(each, values[each.key]) for each in FORMS), values
    assert json.loads(json.dumps(values)) == values


@given(seed=st.integers(0, 2**31), number=st.integers(0, 10**6))
def test_random_values_are_the_same_whatever_came_between(seed, number):
    once = suggest(FORMS, "random", seed, number, [])
    assert suggest(FORMS, "random", seed, number, [record(0, 0.3)]) == once
    assert suggest(FORMS, "random", seed, number + 1, []) != once
    assert suggest(FORMS, "random", seed + 1, number, []) != once


def test_tpe_draws_the_same_from_the_same_record_in_any_order_and_does_not_repeat_itself():
    known = [record(each, each / 20) for each in range(5)]
    once = suggest(FORMS, "optuna", 0, 5, known)
    assert suggest(FORMS, "optuna", 0, 5, known[::-1]) == once
    # A sampler that began anew with its seed at each start would.
    assert len({str(suggest(FORMS, "optuna", 0, number, [])) for number in range(5)}) == 5


def test_tpe_learns_from_the_record():
    """The best of 60 trials, of which 20 are known: it comes closer to where the score is than random search does."""

    def score(values) -> float:
        return 1 - abs(values["fit.activation_weight"] - 0.45) - abs(values["recogniser.dropout"] - 0.1)

    means = {}
    for search in ("random", "optuna"):
        known: list[TrialRecord] = []
        for number in range(60):
            values = suggest(FORMS, search, 0, number, known)
            known.append(record(number, score(values), **values))
        means[search] = sum(each.score for each in known[20:]) / 40
    assert means["optuna"] > means["random"] + 0.05


def test_asha_has_seen_the_trials_that_are_over(tmp_path):
    config = settings(tmp_path, epochs=4, reduction_factor=2)
    report = {"epoch": 1, "inner_ccc": 0.1}
    for over, decision in (([], "CONTINUE"), ([record(0, 0.5), record(1, 0.6, "stopped")], "STOP")):
        stopped: set[int] = set()
        asha = make_scheduler(config, over, stopped)
        trial = SimpleNamespace(config={"number": 7})
        asha.on_trial_add(None, trial)
        assert asha.on_trial_result(None, trial, report) == decision
        assert stopped == ({7} if decision == "STOP" else set())


def test_a_trial_on_record_is_read_back_and_one_under_way_begins_anew(tmp_path):
    journal = Journal(str(tmp_path))
    journal.open({"config": "a"})
    over, running = record(0, 0.5, "stopped"), record(1, 0.4)
    running.status, running.restarts = "running", 2
    for each in (over, running):
        journal.write(each)
    again = Journal(str(tmp_path))
    assert again.identity() == {"config": "a"}
    again.open({"config": "a"})
    assert again.records == {0: over, 1: replace(running, reports=[])}
    assert again.ended() == [over] and over.epochs == 2 and over.score == 0.5
    again.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"number": 0, "values": {}, "status": "odd"}', '{"number": 0'])
def test_a_damaged_record_is_one_line_that_names_it(tmp_path, text):
    journal = Journal(str(tmp_path))
    journal.open({})
    storage.write(f"{journal.folder}/trial-0000/trial.json", text.encode())
    with pytest.raises(UserError, match=r"trial-0000/trial\.json is .*: remove it") as error:
        Journal(str(tmp_path)).open({})
    assert "\n" not in str(error.value)


def test_a_sweep_of_another_config_or_data_does_not_go_on(tmp_path):
    put_corpus(tmp_path / "tones")
    config = settings(tmp_path)
    Journal(config.run_dir).open({"config": "other", "corpus": "other", "encoder": ""})
    with pytest.raises(UserError, match="holds an unfinished sweep with another config and corpus: pass run_dir="):
        sweep(config)


def test_resume_insists_on_a_sweep_that_was_begun(tmp_path):
    put_corpus(tmp_path / "tones")
    with pytest.raises(UserError, match="holds no unfinished sweep to resume: leave --resume out"):
        sweep(settings(tmp_path), resume=True)
    assert not (tmp_path / "run").exists()


def test_a_second_driver_of_a_sweep_that_lives_is_refused(tmp_path):
    put_corpus(tmp_path / "tones")
    config = settings(tmp_path)
    with (
        hold(config.run_dir, LeaseConfig(), take_over=False, say=print),
        pytest.raises(HeldError, match=r"is held by pid \d+ on .*, which is alive"),
    ):
        sweep(config)


class Untagged:
    """A sweep of which nothing is said."""

    name = "s"

    def tags(self, values=None) -> dict[str, str]:
        return {}

    def about(self, title: str, what: str) -> About:
        return About(title, what)


def tracked(config, journal: Journal) -> tuple[Tracker, TrackedTrials]:
    parent = Tracker.start(config.tracking, kind="sweep", name="s", run_dir=config.run_dir, tags={}, params={})
    return parent, TrackedTrials(config.tracking, parent.run_id, journal, Untagged(), 3, always)


def begun(config) -> tuple[Journal, Tracker, TrackedTrials]:
    journal = Journal(config.run_dir)
    journal.open({})
    return journal, *tracked(config, journal)


@pytest.mark.parametrize("noted", [True, False])
def test_the_run_of_a_trial_that_a_dead_driver_left_is_gone_on_with(tmp_path, noted):
    config = settings(tmp_path)
    journal, _, dead = begun(config)
    running = record(0, 0.2, "running")
    journal.write(running)
    dead.start(running)
    dead.report(running, {"epoch": 1, "inner_ccc": 0.25, "train_loss": 1.0})
    assert dead._open[0].flush()
    _, before, _ = family(config)
    if not noted:  # It was killed between the two.
        storage.remove(f"{journal.trial_folder(running)}/run.json")
    _, again = tracked(config, journal)
    again.adopt_existing()
    again.start(running)
    for epoch in (1, 2):
        again.report(running, {"epoch": epoch, "inner_ccc": 0.25 * epoch, "train_loss": 1.0})
    running.status = "finished"
    again.end(running)
    _, [trial], _ = family(config)
    assert trial.run_id == before[0].run_id and trial.status == "FINISHED"
    assert trial.history("inner_ccc") == [(1, 0.25), (2, 0.5)]


def test_a_trial_that_was_over_before_its_run_was_closed_is_closed(tmp_path):
    config = settings(tmp_path)
    journal, _, dead = begun(config)
    over = record(0, 0.5)
    dead.start(over)
    journal.write(over)
    _, again = tracked(config, journal)
    again.adopt_existing()
    _, [trial], _ = family(config)
    assert trial.status == "FINISHED" and trial.history("inner_ccc") == [(1, 0.5), (2, 0.5)]


def test_epochs_that_come_again_after_a_death_are_on_record_once(tmp_path):
    config = settings(tmp_path)
    journal, _, children = begun(config)
    trials = TrialSchedule(config, FORMS, journal, children, deque([0, 1]))
    first = trials.start_next()
    for epoch in (1, 2):
        trials.report(0, {"epoch": epoch, "inner_ccc": 0.5})
    trials.process_died(0, "why")
    assert trials.start_next() is first and first.restarts == 1, "it comes next, with the same values"
    for epoch in (1, 2, 3):
        trials.report(0, {"epoch": epoch, "inner_ccc": 0.5})
    assert [report["epoch"] for report in first.reports] == [1, 2, 3]
    assert (list(trials.left), trials.running) == ([1], {0})


def test_files_of_a_run_that_hold_nothing_but_brackets_are_damaged_ones(tmp_path):
    for name in ("run.json", "sweep.json", "result.json", "predictions.csv"):
        (tmp_path / name).write_text("[" * 100_000)
    assert run_note.read(str(tmp_path)) == {}
    with pytest.raises(UserError, match=r"sweep.json is damaged: remove it"):
        Journal(str(tmp_path)).identity()
    for finished, what in ((finished_result, "fine-tuning"), (_finished, "sweep")):
        with pytest.raises(UserError, match=rf"result.json is not the result of a {what} .*: choose another run_dir"):
            finished(str(tmp_path), {})


@pytest.fixture(scope="module")
def one_ray(s3):
    """One Ray for the module's sweeps, whose workers can reach the S3 server."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        session.connect()
        yield
        ray.shutdown()


def when_over(config, count: int, act) -> threading.Thread:
    """Calls `act` once so many trials are on record as over."""

    def watch() -> None:
        journal, deadline = Journal(config.run_dir), time.monotonic() + 300
        while time.monotonic() < deadline:
            journal.read()
            if len(journal.ended()) >= count:
                act()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def interrupt(number: signal.Signals = signal.SIGINT) -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, number)


# A sweep whose driver is killed goes on likewise, in every run of the tests (test_sweep_killed.py).
@long
# Tune has a handler of SIGUSR1 that cannot be turned off.
@pytest.mark.parametrize(
    ("where", "number"),
    [pytest.param("local", signal.SIGUSR1, id="local"), pytest.param("s3", signal.SIGINT, id="s3")],
)
def test_a_sweep_that_is_interrupted_goes_on_with_the_trials_that_are_left(one_ray, s3, tmp_path, where, number, capfd):
    put_corpus(tmp_path / "tones")
    run_dir = f"{s3.base}/sweeps/{tmp_path.name}" if where == "s3" else str(tmp_path / "run")
    config = settings(tmp_path, epochs=12, trials=3, run_dir=run_dir, search="optuna")
    watching = when_over(config, 1, lambda: interrupt(number))
    # As under the command line, where each of these signals ends the verb.
    with handlers_restored(signal.SIGUSR1, meanwhile=lambda *_: None), pytest.raises(KeyboardInterrupt):
        sweep(config)
    watching.join()
    parent, children, _ = family(config)
    assert parent.status == "KILLED" and {child.status for child in children} <= {"FINISHED", "KILLED"}
    journal = Journal(config.run_dir)
    journal.read()
    over = {each.number: each for each in journal.ended()}
    assert 1 <= len(over) < 3 and not storage.exists(storage.join(run_dir, "result.json"))
    # What the next start reads is never unpickled; the check of the place is read by nothing.
    names = set(storage.list_files(run_dir)) - {"ledger/place-check"}
    assert {name.rpartition(".")[2] for name in names} == {"json"}

    result = sweep(config, resume=True)
    assert f"3 trials, {len(over)} of them done before" in capfd.readouterr().err
    for number, before in over.items():
        row = result["results"][number]
        assert (row["values"], row["seconds"]) == (before.values, round(before.seconds, 3)), "it was run again"
    for number, begun_before in journal.records.items():
        assert result["results"][number]["values"] == begun_before.values
    again, trials, folds = family(config)
    assert again.run_id == parent.run_id == result["run_id"]
    assert len(trials) == 3 and len(folds) == 3
    assert {run.status for run in (again, *trials, *folds)} == {"FINISHED"}
    for trial, row in zip(trials, result["results"], strict=True):
        assert [step for step, _ in trial.history("inner_ccc")] == list(range(1, row["epochs"] + 1))
    left = {name.partition("/")[0] for name in storage.list_files(run_dir)}
    assert left == {"best.yaml", "ledger", "result.json", "run.json", "trials.csv"}


def trial_processes() -> list[psutil.Process]:
    """The processes that Tune trains in."""
    below = psutil.Process().children(recursive=True)
    found = []
    for process in below:
        try:
            if "ImplicitFunc" in " ".join(process.cmdline()) or process.name().startswith("ray::Impl"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_trial_whose_process_is_killed_is_run_again_and_the_sweep_does_not_end(one_ray, tmp_path, capfd):
    put_corpus(tmp_path / "tones")
    config = settings(tmp_path, epochs=20, trials=2, scheduler="none")
    killed = []

    def kill() -> None:
        for process in trial_processes():
            process.send_signal(signal.SIGKILL)
            killed.append(process.pid)

    watching = when_over(config, 1, kill)
    result = sweep(config)
    watching.join()
    assert killed
    assert [row["status"] for row in result["results"]] == ["finished", "finished"]
    assert [row["restarts"] for row in result["results"]] == [0, 1]
    assert [row["epochs"] for row in result["results"]] == [20, 20]
    said = capfd.readouterr().err
    assert "the process of trial-0001 died or failed (The actor " in said and "): it starts again" in said
    assert "Traceback" not in said
    _, trials, _ = family(config)
    assert [trial.status for trial in trials] == ["FINISHED", "FINISHED"]
    assert trials[1].metrics["restarts"] == 1
    assert [step for step, _ in trials[1].history("inner_ccc")] == list(range(1, 21))


@long
def test_a_trial_that_dies_past_what_is_allowed_is_a_bad_trial_and_not_the_end(one_ray, tmp_path):
    put_corpus(tmp_path / "tones")
    config = settings(tmp_path, epochs=20, trials=2, scheduler="none", max_failures=0)
    watching = when_over(config, 1, lambda: [os.kill(each.pid, signal.SIGKILL) for each in trial_processes()])
    result = sweep(config)
    watching.join()
    good, bad = result["results"]
    assert (good["status"], bad["status"]) == ("finished", "failed") and result["best_trial"] == 0
    assert bad["error"].startswith("its process died or failed more than max_failures=0 times: The actor ")
    assert "\n" not in bad["error"] and bad["inner_ccc"] == -1


def test_a_driver_killed_after_the_result_and_before_it_cleared_away_leaves_nothing_to_the_next(one_ray, tmp_path):
    put_corpus(tmp_path / "tones")
    config = settings(tmp_path, scheduler="none")
    kept: list[dict] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "clear", lambda self: kept.append(dict(self.records)))
        result = sweep(config)
    assert len(kept[0]) == 3 and Path(config.run_dir, "trials").exists()
    # What the store, away at its end, did not get.
    unsent = {"run_id": result["run_id"], "values": [["late", 7.0, 1, 1]], "artifacts": {}}
    Path(config.run_dir, "unsent.json").write_text(json.dumps(unsent))
    assert sweep(config) == result
    assert family(config)[0].metrics["late"] == 7.0 and not Path(config.run_dir, "unsent.json").exists()
    assert not Path(config.run_dir, "trials").exists() and not Path(config.run_dir, "sweep.json").exists()
    _, trials, folds = family(config)
    assert (len(trials), len(folds)) == (3, 3)
    assert {run.status for run in (*trials, *folds)} == {"FINISHED"}


def test_a_store_that_fails_while_trials_run_is_the_line_of_the_store(one_ray, tmp_path, monkeypatch):
    put_corpus(tmp_path / "tones")
    config = settings(tmp_path)
    write = Journal.write

    def full(self, one: TrialRecord) -> None:
        if one.is_over:
            raise UserError("the disk is full")
        write(self, one)

    monkeypatch.setattr(Journal, "write", full)
    with pytest.raises(UserError, match="the disk is full"):
        sweep(config)
    parent, *_ = family(config)
    assert parent.status == "FAILED"
