"""A checkpoint that a probe chose on a corpus's speakers does not pass as one that never heard of them."""

import csv
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from made_voices import TINY, put_corpus, recipe
from stores import store

from cpcscale.cluster import session
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.encoders.networks import open_encoder
from cpcscale.emotion.inputs import prepare
from cpcscale.emotion.probe_selection import refuse_selected
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.experiments.finetune import FinetuneConfig, finetune
from cpcscale.model.cpc import build
from cpcscale.runs.ledger import Ledger
from cpcscale.runs.probe_log import Probe, Probes, ProbeSet
from cpcscale.runs.publisher import Publisher
from cpcscale.tracking.runs import read_runs
from cpcscale.tracking.store import TrackingConfig
from cpcscale.train.checkpoint import RunPosition, checkpoint_files_of
from cpcscale.train.recipe import Recipe


def probed(run: Path, corpus: Path, best_by: str = "probe") -> str:
    """A run of two checkpoints, probed on the corpus, the first the better by it and by the loss."""
    there = open_corpus(CorpusConfig(path=str(corpus)))
    probes = Probes(str(run))
    probes.write_set(
        ProbeSet(
            corpus=there.name,
            corpus_digest=there.digest,
            speakers=sorted(set(there.speakers)),
            marks=[],
            settings={},
            stride=1,
        )
    )
    ledger = Ledger(str(run))
    publisher = Publisher(ledger, ledger.head(), 0, keep=2, best_by=best_by)
    network = build(TINY, 7, offset=0.01, gain=3.0)
    for step, mean in ((1, 0.5), (2, 0.4)):
        position = RunPosition(step=step, fingerprint="f" * 64, identity={"model": asdict(TINY)})
        made = checkpoint_files_of({"model": network.state_dict()}, position, Recipe(model=TINY), publisher.probe_set)
        folder = Path(publisher.publish(step, float(step), made)).name
        probes.write(Probe(folder=folder, step=step, status="done", ccc={"mean": mean}))
    return str(run)


def place(run: str, number: int) -> str:
    ledger = Ledger(run)
    return ledger.url(ledger.head().checkpoints[number])


def subset(corpus: Path, folder: Path, speaker: str) -> Path:
    """The rows of one speaker and of one with another name, in a corpus of the same name."""
    rows = list(csv.DictReader((corpus / "manifest.csv").open(encoding="utf-8")))
    rows = [{**row, "path": str(corpus / row["path"])} for row in rows if row["speaker"] in (speaker, "voice5")]
    folder.mkdir(parents=True)
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "speaker": row["speaker"].replace("voice5", "new")} for row in rows)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return put_corpus(tmp_path_factory.mktemp("selection") / "tones", each=3)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> str:
    return probed(tmp_path_factory.mktemp("selected") / "run", corpus)


def taking(corpus: Path, checkpoint: str, system: str = "precpc", **encoder) -> EmotionRecipe:
    base = recipe(corpus, system, checkpoint)
    return replace(base, encoder=replace(base.encoder, **encoder))


def test_the_best_by_probe_is_refused_on_its_own_speakers_in_one_line_however_it_is_named(run, corpus):
    for spec in (taking(corpus, run, which="best"), taking(corpus, place(run, 0))):
        with pytest.raises(UserError, match=r"was chosen by its probe on all speakers of corpus tones, .*newest") as no:
            prepare(spec, open_corpus(spec.corpus))
        assert "\n" not in str(no.value)


def test_one_speaker_of_a_corpus_of_that_name_is_enough_and_none_or_another_name_is_not(run, corpus, tmp_path):
    chosen = taking(corpus, run, which="best")
    _, source = open_encoder(chosen)
    for folder, refused in (("tones", True), ("others", False)):
        part = open_corpus(CorpusConfig(path=str(subset(corpus, tmp_path / folder, "voice2"))))
        if refused:
            with pytest.raises(UserError, match="on speaker voice2 of corpus tones"):
                refuse_selected(chosen, part, source)
        else:
            refuse_selected(chosen, part, source)
    strangers = open_corpus(CorpusConfig(path=str(subset(corpus, tmp_path / "again" / "tones", "nobody"))))
    refuse_selected(chosen, strangers, source)


def test_the_newest_and_the_best_by_loss_are_taken_without_a_word(run, corpus, tmp_path, caplog):
    by_loss = probed(tmp_path / "by-loss", corpus, best_by="loss")
    for spec in (taking(corpus, run), taking(corpus, by_loss, which="best")):
        refuse_selected(spec, open_corpus(spec.corpus), open_encoder(spec)[1])
    assert caplog.text == ""


def test_one_named_by_its_own_path_is_taken_with_a_line_on_the_probes_speakers_alone(run, corpus, tmp_path, caplog):
    named = taking(corpus, place(run, 1))
    _, source = open_encoder(named)
    refuse_selected(named, open_corpus(CorpusConfig(path=str(subset(corpus, tmp_path / "other", "voice2")))), source)
    assert caplog.text == ""
    refuse_selected(named, open_corpus(named.corpus), source)
    [record] = caplog.records
    assert "is from a run with a probe on all speakers of corpus tones" in record.getMessage()


@pytest.mark.parametrize("system", ["random", "mfcc", "mean"])
def test_systems_that_take_no_weights_from_it_take_nothing_of_the_choice(run, corpus, system):
    spec = taking(corpus, run, system, which="best")
    refuse_selected(spec, open_corpus(spec.corpus), open_encoder(spec)[1])


def test_said_so_it_runs_and_carries_its_mark_into_result_and_tracker(run, corpus, tmp_path, monkeypatch):
    spec = taking(corpus, run, which="best", selected_on_test=True)
    parts = {field.name: getattr(spec, field.name) for field in fields(EmotionRecipe)}
    parts |= {"head": "svr", "svm_search": False}
    tracking = TrackingConfig(uri=store(tmp_path))
    config = FinetuneConfig(**parts, run_dir=str(tmp_path / "run"), tracking=tracking)
    # The folds in this process: how Ray runs them is tested with it.
    monkeypatch.setattr(session, "connect", lambda workers=1: None)
    monkeypatch.setattr("cpcscale.experiments.finetune.run_folds", _in_turn)
    finetune(config)
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "SELECTED-ON-TEST" in stored["marks"]
    assert stored["encoder_chosen"] == "best by probe"
    [tracked] = read_runs(tracking)
    assert "SELECTED-ON-TEST" in tracked.tag("marks")
    assert tracked.tag("encoder_chosen") == "best by probe"


def _in_turn(config, prepared, *_):
    from cpcscale.emotion.crossval import run_fold

    return [run_fold(config, prepared, fold) for fold in range(len(prepared.folds.splits))]
