"""`cpcscale checkpoint acoustics` of a tiny pretraining: what it measures, on what, and where the figures go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import speech
from stores import store

from cpcscale import cli, config
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.emotion.acoustics import MEASURES, Judged, Speech, draw_speech, measure_network
from cpcscale.errors import UserError
from cpcscale.model.context import ContextConfig
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.model.encoder import EncoderConfig
from cpcscale.shards.index import Index
from cpcscale.tracking.runs import TrackedRun, read_runs
from cpcscale.tracking.tracker import Tracker
from cpcscale.train.loop import pretrain
from cpcscale.train.ranks import Ranks

FEW = ("utterances=24", "seconds=2")


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """A tracked run of two checkpoints, made and tracked in this process."""
    folder = tmp_path_factory.mktemp("acoustics")
    keys = ["train.steps=8", "checkpoint.every_steps=4", f"data.shards={shards}", f"run_dir={folder / 'run'}"]
    spec = config.load(PretrainConfig, None, [*speech.TINY, *keys, f"tracking.uri={store(folder)}"])
    tracker = Tracker.start(spec.tracking, kind="pretrain", name="run", run_dir=spec.run_dir, tags={}, params={})
    pretrain(spec, speech.data(shards), spec.run_dir, Ranks.current(), speech.Watcher())
    tracker.log(8, {"loss": 2.0})
    tracker.finish("FINISHED")
    return spec


def tracked(run: PretrainConfig) -> TrackedRun:
    [found] = read_runs(run.tracking)
    return found


def test_each_checkpoint_is_measured_beside_the_untrained_network_and_logged_at_its_step_once(run, capsys):
    assert cli.main(["checkpoint", "acoustics", run.run_dir, *FEW, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in found["checkpoints"]] == [4, 8]
    assert (found["utterances"], found["shards"].endswith("/train"), found["groups"] > 3) == (24, True, True)
    # Of the voices of one language, two have several recordings: the Russian ones.
    assert (found["speakers"], found["chance"]) == (2, 0.5)
    for network in (found["random"], *found["checkpoints"]):
        for layer in ("z", "c"):
            assert set(network[layer]) == {*MEASURES, "speaker"}
            assert all(-1 <= value <= 1 for value in network[layer].values())
    assert found["added"] == 3 * 2 * 4
    of = tracked(run)
    assert of.history("acoustics_z_level") == [
        (0, found["random"]["z"]["level"]),
        *((row["step"], row["z"]["level"]) for row in found["checkpoints"]),
    ]
    assert (of.status, of.history("loss")) == ("FINISHED", [(8, 2.0)])
    # Again as text: nothing is added, and one checkpoint by its own path is the same.
    assert cli.main(["checkpoint", "acoustics", found["checkpoints"][1]["checkpoint"], *FEW]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["network", "untrained", "c"]
    assert lines[4].split() == ["step", "8", "z", *(f"{v:.3f}" for v in found["checkpoints"][1]["z"].values())]
    assert lines[-1] == "MLflow: 0 values added to the run, beside its loss"
    assert [len(tracked(run).history(f"acoustics_c_{name}")) for name in MEASURES] == [3, 3, 3]


def test_a_run_that_is_tracked_nowhere_is_measured_all_the_same(run, tmp_path, capsys):
    args = ["checkpoint", "acoustics", run.run_dir, *FEW, f"tracking.uri=sqlite:///{tmp_path}/none.db", "--json"]
    assert cli.main(args) == 0
    assert json.loads(capsys.readouterr().out)["added"] is None
    assert not (tmp_path / "none.db").exists()


def test_speech_is_drawn_alike_at_every_call_a_few_of_each_speaker_and_never_more_than_asked(shards):
    index = Index.load(str(shards / "train"))
    one, other = draw_speech(index, 20, 1.5), draw_speech(index, 20, 1.5)
    assert all(np.array_equal(*pair) for pair in zip(one.waves, other.waves, strict=True))
    np.testing.assert_array_equal(one.target_UP, other.target_UP)
    assert len(one.waves) <= 20 and max(map(len, one.waves)) == 24_000
    low, high = one.target_UP.min(axis=0), one.target_UP.max(axis=0)
    assert -60 < low[0] < high[0] < -5, "dB of full scale"
    # Semitones above 27.5 Hz: from 70 to 400 Hz; syllables a second.
    assert 16 < low[1] < high[1] < 46 and 0 <= low[2] < high[2] < 9
    for part in one.judged:
        names = [one.group_U[row] for row in part.row_U]
        assert len(set(names)) == part.speakers > 1
        for speaker in range(part.speakers):
            assert set(part.half_U[part.speaker_U == speaker]) == {0, 1}


def made(speakers: int = 8, each: int = 6) -> Speech:
    """Noise whose level is the first target, and the cut of whose low-pass says the speaker; the others are noise."""
    rng = np.random.default_rng(0)
    waves, targets, groups = [], [], []
    for number in range(speakers * each):
        level, speaker = rng.uniform(-50, -20), number % speakers
        sound = np.convolve(rng.normal(0, 1, 8000), np.ones(1 + 2 * speaker), mode="same")
        waves.append((10 ** (level / 20) * 32768 * sound / sound.std()).clip(-32768, 32767).astype(np.int16))
        targets.append([level, rng.normal(), rng.normal()])
        groups.append(f"voice{speaker}")
    rows = np.arange(speakers * each)
    return Speech(waves, np.array(targets), groups, [Judged(speakers, rows, rows % speakers, rows // speakers % 2)])


def test_what_frames_hold_is_found_and_what_they_do_not_is_not():
    spec = ModelConfig(encoder=EncoderConfig(kind="logmel", channels=16), context=ContextConfig(width=16))
    network, heard = build(spec, 0, gain=10.0), made()
    network.calibrate(heard.waves)
    figures = measure_network(heard, network)
    for layer in ("z", "c"):
        assert figures[layer]["level"] > 0.9 and figures[layer]["speaker"] > 0.5
        assert max(figures[layer]["pitch"], figures[layer]["rate"]) < 0.4
    assert heard.chance == 1 / 8


def test_too_few_speakers_no_shards_and_wrong_keys_are_refused_in_one_line(run, shards, tmp_path, capsys):
    with pytest.raises(UserError, match=r"of 1 speakers or recordings, and 3 are needed"):
        draw_speech(Index.load(str(shards / "unseen")), 20, 1.5)
    refusals = {
        (run.run_dir, f"shards={tmp_path}"): "no shard set at",
        (run.run_dir, "utterances=3"): "utterances=3 is below 20",
        (run.run_dir, "utterance=30"): "did you mean utterances?",
        (str(tmp_path),): "no checkpoint at",
    }
    for arguments, words in refusals.items():
        assert cli.main(["checkpoint", "acoustics", *arguments]) == 2
        out, error = capsys.readouterr()
        assert (out, words in error.splitlines()[-1]) == ("", True), error
