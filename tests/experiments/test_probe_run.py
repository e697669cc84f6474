"""Probes beside a run, under Ray: which checkpoints they score, what becomes of it, and what goes wrong alone."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import speech
from commands import long
from made_voices import TINY, put_corpus
from stores import store

from cpcscale import cli, config
from cpcscale.cluster import session
from cpcscale.cluster.pretrain_config import PretrainConfig, with_absolute_paths
from cpcscale.cluster.probe_beside import check_probe, run_probes
from cpcscale.errors import UserError
from cpcscale.experiments.pretrain import pretrain
from cpcscale.model.cpc import build
from cpcscale.runs.ledger import Ledger
from cpcscale.runs.probe_log import Probes
from cpcscale.runs.publisher import Publisher
from cpcscale.tracking.runs import TrackedRun, read_runs
from cpcscale.tracking.tracker import Tracker
from cpcscale.train import loop
from cpcscale.train.checkpoint import RunPosition, checkpoint_files_of
from cpcscale.train.ranks import Ranks

WAIT_S = 120


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return put_corpus(tmp_path / "tones", each=3)


def spec(folder: Path, *overrides: str, shards: Path | str = "nowhere") -> PretrainConfig:
    """A run in `folder` that is probed on the tones beside it, the cache in it."""
    keys = [f"run_dir={folder / 'run'}", f"data.shards={shards}", f"probe.corpus.path={folder / 'tones'}"]
    keys += ["probe.split=speakers3", f"probe.audio_cache.path={folder / 'cache'}", "checkpoint.every_steps=5"]
    keys += [f"tracking.uri={store(folder)}", "device=cpu"]
    return with_absolute_paths(config.load(PretrainConfig, None, [*speech.TINY, *keys, *overrides]))


def tracker(of: PretrainConfig) -> Tracker:
    return Tracker.start(of.tracking, kind="pretrain", name="run", run_dir=of.run_dir, tags={}, params={})


def publisher(of: PretrainConfig) -> Publisher:
    """Who goes on with the run; after the probes have said what they are on."""
    ledger = Ledger(of.run_dir)
    seen = ledger.head()
    step = seen.checkpoints[-1].step if seen.checkpoints else 0
    return Publisher(ledger, seen, step, keep=1, best_by=of.checkpoint.best_by)


def publish(by: Publisher, step: int) -> str:
    """A checkpoint whose weights have the seed `step`; the name of its folder."""
    network = build(TINY, step, offset=0.01, gain=3.0)
    position = RunPosition(step=step, fingerprint="f" * 64, identity={"model": asdict(TINY)}, audio_s=step * 360.0)
    made = checkpoint_files_of({"model": network.state_dict()}, position, PretrainConfig(), by.probe_set)
    return Path(by.publish(step, None, made)).name


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tracked(of: PretrainConfig) -> TrackedRun:
    [run] = read_runs(of.tracking)
    return run


@pytest.mark.usefixtures("ray_here")
def test_the_newest_that_is_due_is_scored_the_passed_over_are_said_and_a_restart_scores_none_again(
    tmp_path, corpus, capfd
):
    of = spec(tmp_path, "checkpoint.best_by=probe", "checkpoint.keep=1", "probe.every=2")
    first = tracker(of)
    with run_probes(of, *check_probe(of), first) as probes:
        by = publisher(of)
        for step in (5, 10):
            publish(by, step)
        probes.wake()
        until(lambda: len(Probes(of.run_dir).all()) == 1 and Probes(of.run_dir).all()[0].status == "done")
        for step in (15, 20, 25, 30, 35):
            publish(by, step)
        said = probes.finish()
    first.finish("FINISHED")
    # Every second is due, and the last one in any case; of those that came meanwhile the newest.
    assert [each["step"] for each in said["scores"]] == [10, 35]
    assert [each["audio_hours"] for each in said["scores"]] == [1.0, 3.5]
    assert "step 35 now; 2 checkpoint(s) before it were passed over" in capfd.readouterr().err
    best = max(said["scores"], key=lambda each: each["ccc"]["mean"])["step"]
    assert said["best_step"] == best
    # 10 was the best while others came, 20 and 30 waited.
    assert [each.step for each in Ledger(of.run_dir).head().checkpoints] == [10, 20, 30, 35]
    history = {name: tracked(of).history(f"probe_{name}") for name in ("ccc_mean", "ccc_valence", "audio_hours")}
    assert all([step for step, _ in points] == [10, 35] for points in history.values())
    assert [hours for _, hours in history["audio_hours"]] == pytest.approx([1.0, 3.5])
    # As a run that was killed before the tracker had the last: what is known is not made again, nor logged twice.
    second = tracker(of)
    with run_probes(of, *check_probe(of), second) as probes:
        assert probes.finish()["scores"] == said["scores"]
    second.finish("FINISHED")
    assert tracked(of).history("probe_ccc_mean") == history["ccc_mean"]
    with pytest.raises(UserError, match=r"was probed on corpus tones .*split=speakers3.*name another run_dir"):
        check_probe(spec(tmp_path, "probe.split=loso"))


@pytest.mark.usefixtures("ray_here")
def test_bad_audio_is_one_line_and_a_tag_and_a_mended_set_is_probed_at_the_next_start(tmp_path, corpus, capfd):
    (corpus / "03.wav").write_bytes(b"not audio")
    of = spec(tmp_path)
    first = tracker(of)
    with run_probes(of, *check_probe(of), first) as probes:
        folder = publish(publisher(of), 5)
        said = probes.finish()
    first.finish("FINISHED")
    assert (said["scores"], [each["step"] for each in said["failed"]]) == ([], [5])
    [line] = [line for line in capfd.readouterr().err.splitlines() if "the run goes on" in line]
    assert line.startswith("probe: step 5 failed, the run goes on: ") and "03.wav" in line
    assert tracked(of).tag("probe_failed").startswith("step 5: ")
    assert Probes(of.run_dir).of(folder).status == "failed"
    put_corpus(tmp_path / "again", each=3)
    (tmp_path / "again" / "03.wav").replace(corpus / "03.wav")
    second = tracker(of)
    with run_probes(of, *check_probe(of), second) as probes:
        assert [each["step"] for each in probes.finish()["scores"]] == [5]
    second.finish("FINISHED")


@long
@pytest.mark.usefixtures("ray_here")
def test_a_scorer_that_is_killed_costs_one_probe_and_the_next_has_another(tmp_path, corpus):
    import ray

    of = spec(tmp_path)
    log = tracker(of)
    with run_probes(of, *check_probe(of), log) as probes:
        by = publisher(of)
        pid = ray.get(probes._scorer.__ray_call__.remote(lambda _: os.getpid()))
        assert os.getpriority(os.PRIO_PROCESS, pid) == 19, "it takes what workers leave"
        # It stops in the middle, as one that runs out of memory does.
        os.kill(pid, signal.SIGSTOP)
        publish(by, 5)
        probes.wake()
        until(lambda: len(Probes(of.run_dir).all()) == 1)
        os.kill(pid, signal.SIGKILL)
        until(lambda: Probes(of.run_dir).all()[0].status == "failed")
        publish(by, 10)
        said = probes.finish()
    log.finish("FINISHED")
    [failed] = said["failed"]
    assert failed["step"] == 5 and "its process died" in failed["why"]
    assert [each["step"] for each in said["scores"]] == [10]


@long
@pytest.mark.usefixtures("ray_here")
def test_an_interrupted_run_leaves_a_probe_under_way_behind_and_the_next_start_makes_it(tmp_path, corpus):
    import ray

    of = spec(tmp_path)
    log = tracker(of)
    with pytest.raises(KeyboardInterrupt), run_probes(of, *check_probe(of), log) as probes:
        by = publisher(of)
        os.kill(ray.get(probes._scorer.__ray_call__.remote(lambda _: os.getpid())), signal.SIGSTOP)
        publish(by, 5)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        probes.finish()
    assert [each.status for each in Probes(of.run_dir).all()] == ["running"]
    log.finish("KILLED")
    again = Probes(of.run_dir).claim(Ledger(of.run_dir), check_probe(of)[1])
    assert again is not None and again.step == 5


def test_a_run_shows_its_probes_keeps_the_best_by_them_and_goes_on_as_if_there_were_none(
    ray_here, shards, tmp_path, corpus, capsys
):
    more = ["train.steps=10", "checkpoint.best_by=probe", "feed.decode_threads=1"]
    summary = pretrain(spec(tmp_path, *more, shards=shards))
    probe = summary["probe"]
    assert (probe["corpus"], probe["speakers"], probe["marks"]) == ("tones", 6, [])
    assert probe["scores"][-1]["step"] == 10
    best = max(probe["scores"], key=lambda each: each["ccc"]["mean"])
    assert cli.main(["checkpoint", "ls", str(tmp_path / "run"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [row["step"] for row in rows if row["best"]] == [best["step"]]
    assert {row["step"]: row["probe_ccc"] for row in rows if row["probe"]} == {
        each["step"]: each["ccc"]["mean"] for each in probe["scores"]
    }
    state = json.loads(Path(summary["checkpoint"], "state.json").read_text())
    assert state["probe_set"]["speakers"] == [f"voice{number}" for number in range(6)]
    run = tracked(spec(tmp_path))
    assert [step for step, _ in run.history("probe_ccc_mean")] == [each["step"] for each in probe["scores"]]
    assert run.tag("probe_corpus") == "tones"
    # What is learned is what is learned without a probe.
    alone = spec(tmp_path, *more[:1], "probe.corpus.path=", shards=shards)
    there = loop.pretrain(
        alone, speech.data(shards, validate=True), str(tmp_path / "alone"), Ranks.current(), speech.Watcher()
    )
    assert there["loss"] == pytest.approx(summary["loss"], abs=1e-6)
    assert not (tmp_path / "alone" / "probe").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["probe.corpus.path=no-corpus"], "no corpus at corpus.path="),
        (["probe.split=speakers9"], "6 speakers cannot fill 9 folds"),
    ],
)
def test_a_set_that_does_not_do_is_refused_before_ray_starts(shards, tmp_path, corpus, monkeypatch, overrides, words):
    def connect(workers: int = 1) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(session, "connect", connect)
    with pytest.raises(UserError, match=words):
        pretrain(spec(tmp_path, "train.steps=5", *overrides, shards=shards))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["checkpoint.best_by=probe"], "checkpoint.best_by=probe without a probe: name a labelled corpus"),
        (["probe.every=0"], "probe.every=0 is below 1"),
        (["probe.cpus=-1"], "probe.cpus=-1 is below 0"),
        (["probe.split=half"], "protocol='half' is unknown"),
    ],
)
def test_a_senseless_probe_is_refused_as_the_config_is_read(overrides, words):
    with pytest.raises(UserError, match=words):
        config.load(PretrainConfig, None, overrides)
