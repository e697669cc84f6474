"""How a run's probes show: at its end, among its checkpoints, and on the page."""

import dataclasses
from pathlib import Path

import checkpoints
from test_pretrain_lines import SUMMARY

from cpcscale import cli
from cpcscale.report.html.compare_page import write_html
from cpcscale.report.html.plots import probe_plot
from cpcscale.report.terminal.pretrain import pretrain_lines
from cpcscale.runs.ledger import Ledger
from cpcscale.runs.probe_log import Probe, Probes, ProbeSet
from cpcscale.tracking.runs import read_runs
from cpcscale.tracking.store import TrackingConfig
from cpcscale.tracking.tracker import Tracker

PRIMITIVES = ("activation", "valence", "dominance")


def ccc(value: float) -> dict[str, float]:
    return {**dict.fromkeys(PRIMITIVES, value), "mean": value}


def score(step: int, mean: float) -> dict:
    return {"step": step, "audio_hours": step / 10, "ccc": ccc(mean), "seconds": 3.0}


def test_the_end_of_a_run_says_its_last_probe_and_its_best_with_the_marks_of_the_set():
    probe = {
        "corpus": "tones",
        "split": "loso",
        "speakers": 6,
        "marks": ["MADE"],
        "failed": [{"step": 20, "why": "03.wav is bad"}],
    }
    scores = [score(10, 0.5), score(30, 0.4)]
    lines = list(pretrain_lines({**SUMMARY, "probe": {**probe, "scores": scores, "best_step": None}}))[-6:-2]
    assert lines == [
        "  probe on tones (loso, 6 speakers, MADE)",
        "  last           CCC mean 0.400, activation 0.400, valence 0.400, dominance 0.400 (step 30, 3.00 h)",
        "  best           CCC mean 0.500, activation 0.500, valence 0.500, dominance 0.500 (step 10, 1.00 h)",
        "  the probe of step 20 failed: 03.wav is bad",
    ]
    lines = list(pretrain_lines({**SUMMARY, "probe": {**probe, "scores": [], "best_step": None}}))
    assert not any("CCC" in line for line in lines)


def test_ls_shows_the_figure_of_each_and_marks_the_best_by_what_the_run_chooses_by(tmp_path, capsys):
    probes = Probes(str(tmp_path))
    for step, loss, mean in ((4, 1.0, 0.2), (8, 2.0, 0.6), (12, 3.0, None)):
        url = checkpoints.publish(tmp_path, checkpoints.position(step, audio_s=3600.0, metrics={"heldout_loss": loss}))
        status = "done" if mean else "running"
        probes.write(Probe(folder=Path(url).name, step=step, status=status, ccc={"mean": mean} if mean else {}))
    assert cli.main(["checkpoint", "ls", str(tmp_path)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["checkpoint", "step", "audio", "h", "held-out", "probe", "CCC", "MB", "age"]
    assert [row.split()[4] for row in rows] == ["0.200", "0.600", "running"]
    assert [row.endswith("best") for row in rows] == [True, False, False]
    ledger = Ledger(str(tmp_path))
    state = dataclasses.replace(ledger.head(), number=ledger.highest() + 1, best_by="probe")
    assert ledger.advance(state)
    assert cli.main(["checkpoint", "ls", str(tmp_path)]) == 0
    assert [row.endswith("best") for row in capsys.readouterr().out.splitlines()[1:]] == [False, True, False]


def test_the_page_draws_ccc_over_hours_and_names_the_set(tmp_path):
    settings = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    probe_set = ProbeSet(corpus="tones", corpus_digest="d" * 64, speakers=["a"], marks=["MADE"], settings={}, stride=10)
    for name, tags in (("probed", probe_set.tags()), ("plain", {})):
        tracker = Tracker.start(settings, kind="pretrain", name=name, run_dir=None, tags=tags, params={})
        for step in (10, 20):
            tracker.log(step, {"loss": 3.0, "accuracy_mean": 0.2})
            if tags:
                tracker.log(step, {f"probe_ccc_{key}": value for key, value in ccc(step / 100).items()})
                tracker.log(step, {"probe_audio_hours": step / 10})
        tracker.finish("FINISHED")
    write_html(read_runs(settings), str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("CCC of the probes over hours of audio") == 1
    assert page.count("Probe: CCC on tones, MADE.") == 1


def test_a_step_without_its_hours_is_left_out_of_the_drawing():
    drawn = probe_plot([(10, 1.0)], {"mean": [(10, 0.3), (20, 0.4)]})
    assert "hours of audio" in drawn
