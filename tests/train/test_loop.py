import contextlib
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import speech
import torch

from cpcscale.errors import UserError
from cpcscale.model.cpc import build
from cpcscale.runs.checkpoint_files import MARKER
from cpcscale.runs.ledger import Ledger, RunHolder
from cpcscale.shards.index import Index
from cpcscale.shards.index_writer import IndexWriter, exclude
from cpcscale.shards.rows import ShardEntry
from cpcscale.stream import window
from cpcscale.stream.feed import FeedSource, fixed_batches
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window_counts import shard_windows
from cpcscale.train import constants
from cpcscale.train.checkpoint import load_checkpoint, load_encoder
from cpcscale.train.loop import pretrain
from cpcscale.train.optim import learning_rate
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.resume import load_initial_weights
from cpcscale.train.setup import Data

ALONE = Ranks(0, 1, 1, torch.device("cpu"))
SUMMARY = {
    "steps",
    "loss",
    "accuracy_mean",
    "accuracy_chance",
    "audio_s",
    "audio_s_per_s",
    "data_wait_share",
    "time",
    "hidden",
    "memory_peak_mib",
    "mfu",
    "learning_rate",
    "checkpoint",
    "skipped_updates",
    "bad_windows",
}


def run(
    recipe: Recipe, data: Data | Path, folder: Path, watcher: speech.Watcher | None = None
) -> tuple[dict[str, Any], speech.Watcher]:
    """The summary of a run in `folder`, and what an observer saw of it."""
    watcher = watcher or speech.Watcher()
    data = speech.data(data) if isinstance(data, Path) else data
    return pretrain(recipe, data, str(folder), ALONE, watcher), watcher


def short(folder: Path, **overrides: Any) -> Recipe:
    """Nine steps of 2 s windows, eleven an epoch; ids beside the run."""
    values = {
        "window__seconds": 2.08,
        "train__steps": 9,
        "checkpoint__every_steps": 2,
        "train__log_window_ids": folder.with_suffix(".jsonl"),
    }
    return speech.recipe(**{**values, **overrides})


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict[int, float], Path]:
    """(summary, loss by step, run folder) of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    summary, watcher = run(short(folder), shards, folder)
    return summary, watcher.losses, folder


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    shutil.copy(folder.with_suffix(".jsonl"), to.with_suffix(".jsonl"))
    return to


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_summary_has_what_scripts_rely_on(undisturbed):
    summary, losses, folder = undisturbed
    assert set(summary) == SUMMARY
    assert summary["steps"] == 9
    assert summary["loss"] == losses[9]
    assert summary["accuracy_chance"] == pytest.approx(1 / 9)
    assert summary["checkpoint"] == str(folder / "checkpoints" / "step-00000009-0001")
    assert 0 <= summary["data_wait_share"] <= 1
    assert summary["skipped_updates"] == summary["bad_windows"] == 0


@pytest.mark.parametrize("stop_at", range(1, 10))
def test_a_run_interrupted_at_any_step_gives_the_losses_and_batches_of_an_undisturbed_one(
    undisturbed, shards, tmp_path, stop_at
):
    summary, losses, folder = undisturbed
    recipe = short(tmp_path / "run")
    first = speech.Watcher(stop_at)
    with pytest.raises(speech.Killed):
        run(recipe, shards, tmp_path / "run", first)
    resumed, second = run(recipe, shards, tmp_path / "run")
    assert min(second.losses) == (stop_at - 1) // 2 * 2 + 1, "goes on from the last checkpoint"
    for seen in (first.losses, second.losses):
        assert seen == pytest.approx({step: losses[step] for step in seen}, abs=1e-6)
    assert first.losses.keys() | second.losses.keys() == losses.keys()
    assert resumed["loss"] == pytest.approx(summary["loss"], abs=1e-6)
    assert resumed["audio_s"] == pytest.approx(summary["audio_s"])
    assert speech.ids(tmp_path / "run.jsonl") == speech.ids(folder.with_suffix(".jsonl"))


def test_mean_weights_a_learnt_temperature_and_a_falling_rate_go_on_as_if_nothing_had_happened(shards, tmp_path):
    keys = {"optim__ema_decay": 0.9, "optim__schedule": "cosine", "objective__score": "cosine"}
    keys |= {"objective__learn_temperature": True, "objective__temperature": 0.1}
    summaries = []
    for name, stop_at in (("whole", 0), ("killed", 5)):
        recipe = short(tmp_path / name, **keys)
        if stop_at:
            with pytest.raises(speech.Killed):
                run(recipe, shards, tmp_path / name, speech.Watcher(stop_at))
        summaries.append(run(recipe, shards, tmp_path / name)[0])
    one, other = (load_checkpoint(summary["checkpoint"]).tensors for summary in summaries)
    assert set(one) == set(other) == {"model", "objective", "optimizer", "ema"}
    for part in one:
        torch.testing.assert_close(other[part], one[part], rtol=0, atol=1e-6)
    assert one["objective"]["heads.infonce.log_scale"] != -math.log(0.1), "it is learnt"
    kept = load_encoder(summaries[0]["checkpoint"])[0].state_dict()
    assert all(torch.equal(kept[name], one["ema"][f"module.{name}"]) for name in kept)
    assert any(not torch.equal(kept[name], one["model"][name]) for name in kept)


def test_a_sum_of_objectives_goes_on_as_if_nothing_had_happened_and_its_encoder_loads_without_heads(
    shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "WINDOWS", 40)
    spec = speech.recipe(
        window__seconds=1.28,
        train__steps=5,
        train__batch=4,
        train__lanes=4,
        train__validate_every_steps=5,
        train__validate_windows=8,
        checkpoint__every_steps=2,
        objective__scope="mixed",
        objective__draw="shared",
        objective__acoustic__frames=0.5,
        objective__acoustic__window=0.5,
        objective__pooled__weight=0.2,
    )
    data = speech.data(shards, validate=True)
    whole, _ = run(spec, data, tmp_path / "whole")
    with pytest.raises(speech.Killed):
        run(spec, data, tmp_path / "killed", speech.Watcher(3))
    resumed, _ = run(spec, data, tmp_path / "killed")
    one, other = (load_checkpoint(summary["checkpoint"]) for summary in (whole, resumed))
    for part, tensors in one.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(other.tensors[part][name], tensor), name
    metrics = one.position.metrics
    own = {"frames_loss", "frames_f0_loss", "window_loss", "pooled_loss", "pooled_accuracy", "sum_loss"}
    assert own | {"heldout_frames_loss", "unseen_window_loss"} <= metrics.keys()
    assert "heldout_pooled_loss" not in metrics, "its negatives are those of a batch"
    others = 0.5 * metrics["frames_loss"] + 0.5 * metrics["window_loss"] + 0.2 * metrics["pooled_loss"]
    assert metrics["sum_loss"] == pytest.approx(metrics["loss"] + math.log(9) * others)
    heads = one.tensors["objective"]
    # dB re full scale, and octaves: what speech has, not the 0 and 1 of a new head.
    assert -60 < heads["heads.frames.targets.mean_F"][0] < -10
    assert 6 < heads["heads.frames.targets.mean_F"][1] < 9
    assert 0.1 < heads["heads.frames.targets.deviation_F"][1] < 1
    network, _ = load_encoder(str(tmp_path / "whole"))
    assert network.state_dict().keys() == one.tensors["model"].keys()


def test_a_rate_that_goes_on_elsewhere_than_it_was_is_said_with_both_values(shards, tmp_path):
    keys = {"optim__learning_rate": 1e-3, "optim__schedule": "cosine", "optim__final_share": 0.01}
    spec = short(tmp_path / "run", **keys).optim
    first, _ = run(short(tmp_path / "run", train__steps=4, **keys), shards, tmp_path / "run")
    assert first["learning_rate"] == learning_rate(spec, 3, 4)
    longer, watcher = run(short(tmp_path / "run", train__steps=6, **keys), shards, tmp_path / "run")
    [line] = [note for note in watcher.notes if "learning rate" in note]
    assert f"was {learning_rate(spec, 3, 4):.3g} at step 4 and goes on at {learning_rate(spec, 4, 6):.3g}: " in line
    assert "optim.schedule=cosine is spread over 6 steps now" in line
    assert longer["learning_rate"] == learning_rate(spec, 5, 6)


def test_a_rate_that_goes_on_where_it_was_is_no_news(undisturbed, shards, tmp_path):
    copied(undisturbed[2], tmp_path / "run")
    _, watcher = run(short(tmp_path / "run", train__steps=10), shards, tmp_path / "run")
    assert not [note for note in watcher.notes if "learning rate" in note]


def test_the_weights_of_another_network_come_without_its_level():
    spec = speech.recipe().model
    mine, theirs = build(spec, 0, offset=0.1, gain=3.0), build(spec, 1, offset=0.2, gain=9.0)
    load_initial_weights(mine, theirs)
    assert (mine.offset.item(), mine.gain.item()) == (pytest.approx(0.1), 3.0)
    assert all(torch.equal(one, other) for one, other in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_a_run_over_log_mel_goes_on_with_the_bands_that_it_measured_at_its_start(shards, tmp_path):
    # Windows that some utterances do not fill.
    keys = {"model__encoder__kind": "logmel", "optim__ema_decay": 0.9, "window__seconds": 4.16}
    whole, watcher = run(short(tmp_path / "whole", **keys), shards, tmp_path / "whole")
    first, _ = load_encoder(whole["checkpoint"])
    mean_M, deviation_M = first.encoder.front.mean, first.encoder.front.deviation
    # The set has fewer windows than are enough, so all of them count, in whatever order.
    index, spec = speech.data(shards).train, short(tmp_path, **keys)
    again = build(spec.model, 0, **dict(zip(("offset", "gain"), index.wave_scale(), strict=True)))
    order = RunOrder(shard_windows(index, spec.window), 1, 1, 1)
    batches = fixed_batches(FeedSource(index, order, spec.window, spec.feed), np.arange(order.epoch_order.total), 8)
    again.calibrate(batch.wave_BS[row, :count] for batch in batches for row, count in enumerate(batch.samples_B))
    torch.testing.assert_close(mean_M, again.encoder.front.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(deviation_M, again.encoder.front.deviation, rtol=0, atol=1e-4)
    with pytest.raises(speech.Killed):
        run(short(tmp_path / "killed", **keys), shards, tmp_path / "killed", speech.Watcher(5))
    resumed, later = run(short(tmp_path / "killed", **keys), shards, tmp_path / "killed")
    assert later.losses == pytest.approx({step: watcher.losses[step] for step in later.losses}, abs=1e-6)
    second, _ = load_encoder(resumed["checkpoint"])
    assert all(torch.equal(tensor, second.constants[name]) for name, tensor in first.constants.items())


def test_a_run_begins_with_the_weights_of_another(undisturbed, shards, tmp_path):
    there, _ = load_encoder(undisturbed[0]["checkpoint"])
    keys = {"init_from": undisturbed[2], "optim__learning_rate": 0, "optim__weight_decay": 0, "train__steps": 2}
    summary, _ = run(short(tmp_path / "run", **keys), shards, tmp_path / "run")
    here, _ = load_encoder(summary["checkpoint"])
    assert all(torch.equal(tensor, there.state_dict()[name]) for name, tensor in here.state_dict().items())
    # Once begun it goes on from its own checkpoint, wherever the other is.
    again, _ = run(short(tmp_path / "run", **keys | {"train__steps": 4}), shards, tmp_path / "run")
    assert again["steps"] == 4


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"init_from": "nowhere"}, "no checkpoint at nowhere"),
        ({"model__context__width": 8}, "model.context.width=16, this config says 8: keep the network's shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(undisturbed, shards, tmp_path, keys, words):
    with pytest.raises(UserError, match=words):
        run(short(tmp_path / "run", **{"init_from": undisturbed[2], **keys}), shards, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_half_a_line_that_a_killed_run_left_among_the_ids_is_dropped(undisturbed, shards, tmp_path):
    recipe = short(tmp_path / "run")
    with pytest.raises(speech.Killed):
        run(recipe, shards, tmp_path / "run", speech.Watcher(5))
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"step": 6, "epoch": 0, "ids": ["asterisk_en/agent#')
    run(recipe, shards, tmp_path / "run")
    assert speech.ids(tmp_path / "run.jsonl") == speech.ids(undisturbed[2].with_suffix(".jsonl"))


def test_a_torn_newest_checkpoint_costs_its_steps_and_nothing_else(undisturbed, shards, tmp_path, caplog):
    recipe = short(tmp_path / "run")
    with pytest.raises(speech.Killed):
        run(recipe, shards, tmp_path / "run", speech.Watcher(5))
    (tmp_path / "run" / "checkpoints" / "step-00000004-0001" / "model.safetensors").write_bytes(b"cut")
    resumed, watcher = run(recipe, shards, tmp_path / "run")
    assert min(watcher.losses) == 3
    assert "step-00000004" in caplog.text
    assert resumed["loss"] == pytest.approx(undisturbed[0]["loss"], abs=1e-6)


@pytest.mark.parametrize("keys", [{}, {"order__run": 2}], ids=["shuffled", "in runs"])
def test_every_epoch_has_every_window_exactly_once(shards, tmp_path, keys):
    recipe = short(tmp_path / "run", train__steps=0, train__epochs=2, window__seconds=4.0, **keys)
    summary, _ = run(recipe, shards, tmp_path / "run")
    index = speech.data(shards).train
    expected = sorted(
        f"{key}#{number}"
        for key, windows in zip(
            index.utterances["key"].to_pylist(), window.count(recipe.window, index.samples), strict=True
        )
        for number in range(windows)
    )
    by_step = speech.ids(tmp_path / "run.jsonl")
    half = len(by_step) // 2
    epochs = [
        [name for step in steps for name in by_step[step]]
        for steps in (range(1, half + 1), range(half + 1, 2 * half + 1))
    ]
    assert [sorted(epoch) for epoch in epochs] == [expected, expected]
    assert epochs[0] != epochs[1]
    assert summary["steps"] == 2 * half


def test_a_finished_run_states_its_summary_again_without_training(undisturbed, shards, tmp_path):
    folder = copied(undisturbed[2], tmp_path / "run")
    before = files(tmp_path)
    recipe = short(undisturbed[2], train__log_window_ids=tmp_path / "run.jsonl")
    again, watcher = run(recipe, shards, folder)
    assert watcher.losses == {}
    assert files(tmp_path) == before
    # Rates are of this process; one that trained nothing gives those of the last steps that were.
    rates = {name: again[name] for name in ("audio_s_per_s", "data_wait_share", "time", "hidden")}
    assert again == undisturbed[0] | rates | {"checkpoint": str(folder / "checkpoints" / "step-00000009-0001")}
    assert rates["audio_s_per_s"] > 0


def test_a_run_shortened_to_its_last_checkpoint_states_loss_and_heldout_scores_of_that_step(shards, tmp_path):
    rare = {"train__log_every_steps": 100, "train__validate_every_steps": 100}
    data = speech.data(shards, validate=True)
    with pytest.raises(speech.Killed):
        run(short(tmp_path / "run", **rare), data, tmp_path / "run", speech.Watcher(5))
    summary, _ = run(short(tmp_path / "run", **rare, train__steps=4), data, tmp_path / "run")
    expected, _ = run(short(tmp_path / "other", train__steps=4), data, tmp_path / "other")
    for name in ("steps", "loss", "accuracy_mean", "audio_s", "heldout", "unseen"):
        assert summary[name] == pytest.approx(expected[name], abs=1e-6), name


def test_the_best_checkpoint_is_the_first_with_the_lowest_loss_of_its_own_step(shards, tmp_path):
    """At a rate of 0 all losses are alike; checkpoints 2 and 4, which no validation met, have none."""
    recipe = short(tmp_path / "run", optim__learning_rate=0, train__validate_every_steps=3, checkpoint__keep=1)
    run(recipe, speech.data(shards, validate=True), tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run") == [6, 9]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train__batch": 32}, "train.batch=16, this config says 32"),
        ({"train__lanes": 4}, "train.lanes=8, this config says 4"),
        ({"window__seconds": 4.16}, "window.seconds=2.08, this config says 4.16"),
        ({"window__kind": "crop"}, "window.kind=tile, this config says crop"),
        ({"seed": 1}, "seed=0, this config says 1"),
        ({"model__context__width": 8}, "model.context.width=16, this config says 8"),
        ({"objective__negatives": 7}, "objective.negatives=8, this config says 7"),
        ({"objective__pooled__weight": 0.2}, "no objective.pooled.weight, this config says 0.2"),
        ({"order__run": 2}, "no order.run, this config says 2"),
        ({"optim__learning_rate": 0.1}, "optim.learning_rate=0.0002, this config says 0.1"),
        ({"seed": 1, "train__batch": 32}, "and 1 more"),
        ({"train__steps": 8}, "is at step 9, past the 8 steps asked for"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused_with_the_way_out(undisturbed, shards, tmp_path, overrides, words):
    folder = copied(undisturbed[2], tmp_path / "run")
    before = files(tmp_path)
    with pytest.raises(UserError) as refusal:
        run(short(undisturbed[2], train__log_window_ids=tmp_path / "run.jsonl", **overrides), shards, folder)
    assert words in str(refusal.value)
    assert "name another run_dir" in str(refusal.value)
    assert files(tmp_path) == before, "a refused run touches neither checkpoints nor ids"


def test_a_checkpoint_of_another_shard_set_is_refused_with_both_fingerprints(undisturbed, shards, tmp_path):
    folder = copied(undisturbed[2], tmp_path / "run")
    other = Data(speech.spoil(shards, tmp_path / "other", [0]), {})
    with pytest.raises(UserError, match="another shard set") as refusal:
        run(short(undisturbed[2]), other, folder)
    for fingerprint in (other.train.fingerprint, speech.data(shards).train.fingerprint):
        assert fingerprint[:12] in str(refusal.value)


def test_how_fast_and_how_often_may_change_in_mid_run(undisturbed, shards, tmp_path):
    recipe = short(tmp_path / "run")
    with pytest.raises(speech.Killed):
        run(recipe, shards, tmp_path / "run", speech.Watcher(5))
    other = {"train__micro_batch": 3, "feed__prefetch": 1, "checkpoint__every_steps": 4, "checkpoint__keep": 1}
    resumed, _ = run(short(tmp_path / "run", **other), shards, tmp_path / "run")
    assert resumed["loss"] == pytest.approx(undisturbed[0]["loss"], abs=1e-4)
    assert speech.ids(tmp_path / "run.jsonl") == speech.ids(undisturbed[2].with_suffix(".jsonl"))


def test_what_a_run_goes_on_by_says_nothing_of_its_size_its_precision_or_its_pieces():
    recipe = short(Path("run"))
    other = {"precision": "bf16", "micro_batch": 3, "threads": 2, "steps": 7, "log_every_steps": 5}
    changed = {f"train__{name}": value for name, value in other.items()} | {"checkpoint__every_steps": 1}
    assert short(Path("run"), **changed).identity() == recipe.identity()
    names = set(json.dumps(recipe.identity()).replace('"', " ").split())
    assert not names & {"precision", "micro_batch", "workers", "world", "threads", "steps_per_epoch"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_scale_of_fp16_is_no_hindrance_to_go_on_in_another_precision(undisturbed, shards, tmp_path, precision):
    with pytest.raises(speech.Killed):
        run(short(tmp_path / "run"), shards, tmp_path / "run", speech.Watcher(5))
    position = checkpoints.newest(tmp_path / "run").position
    scaler = torch.amp.GradScaler("cpu").state_dict()
    assert scaler["scale"] > 1
    step = checkpoints.restored(tmp_path / "run")
    checkpoints.publish(tmp_path / "run", dataclasses.replace(position, scaler=scaler), step)
    resumed, watcher = run(short(tmp_path / "run", train__precision=precision), shards, tmp_path / "run")
    assert min(watcher.losses) == 5
    assert resumed["loss"] == pytest.approx(undisturbed[0]["loss"], abs=1e-6 if precision == "fp32" else 0.05)
    assert checkpoints.newest(tmp_path / "run").position.scaler == {}


class Looking(speech.Watcher):
    """An observer that notes which checkpoints a reader of the run finds when it is told that one was saved."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.run_dir, self.found = run_dir, []

    def saved(self) -> None:
        super().saved()
        self.found.append(checkpoints.steps(self.run_dir)[-1])


def test_saved_is_said_once_a_checkpoint_is_published_and_the_last_before_the_summary(shards, tmp_path):
    summary, watcher = run(short(tmp_path / "run"), shards, tmp_path / "run", Looking(tmp_path / "run"))
    assert watcher.found == [2, 4, 6, 8, 9]
    assert summary["checkpoint"] == checkpoints.newest(tmp_path / "run").url


@pytest.mark.parametrize(("step", "left"), [(4, [2]), (9, [6, 8])])
def test_a_checkpoint_that_cannot_be_written_stops_the_run_in_one_line_and_those_before_it_stay(
    shards, tmp_path, faulty_s3, step, left
):
    faulty_s3.fail("status", method="PUT", path=f"step-{step:08d}", status=403, code="AccessDenied")
    with pytest.raises(UserError, match=rf"access to s3://.*step-{step:08d}-0001/.* is denied") as refusal:
        pretrain(short(tmp_path / "run"), speech.data(shards), faulty_s3.base, ALONE, speech.Watcher())
    assert "\n" not in str(refusal.value)
    assert checkpoints.steps(faulty_s3.base) == left


class Overtaking(speech.Watcher):
    """An observer in whose run another driver appears at a step."""

    def __init__(self, run_dir: Path, at: int) -> None:
        super().__init__()
        self.ledger, self.at = Ledger(str(run_dir)), at

    def progress(self, step: int, total: int) -> None:
        if step == self.at:
            assert self.ledger.advance(self.ledger.head().taken(RunHolder("new", "node7", 12, "", "", 0.0, 30.0)))


def test_a_run_that_another_driver_takes_over_stops_and_publishes_nothing_more(shards, tmp_path):
    watcher = Overtaking(tmp_path / "run", at=5)
    with pytest.raises(UserError, match="was taken over by pid 12 on node7") as refusal:
        run(short(tmp_path / "run"), shards, tmp_path / "run", watcher)
    assert "\n" not in str(refusal.value)
    assert max(watcher.losses) == 8, "it learns of it when it saves step 6, and says so at the next save"
    assert checkpoints.steps(tmp_path / "run") == [2, 4]
    assert sorted(path.parent.name[:13] for path in (tmp_path / "run").rglob(MARKER)) == [
        "step-00000002",
        "step-00000004",
    ]


def test_a_window_that_does_not_decode_keeps_its_place_and_stops_no_run_below_the_budget(undisturbed, shards, tmp_path):
    """Wherever the order puts it: the budget is a share of an epoch, also when the bad window comes first."""
    index = speech.data(shards).train
    first = speech.ids(undisturbed[2].with_suffix(".jsonl"))[1][0]
    number = index.utterances["key"].to_pylist().index(first.partition("#")[0])
    data = Data(speech.spoil(shards, tmp_path / "spoilt", [number]), {})
    windows = int(window.count(short(tmp_path).window, index.samples)[number])
    summary, _ = run(short(tmp_path / "run", feed__bad_budget=0.05), data, tmp_path / "run")
    assert 1 <= summary["bad_windows"] <= windows
    assert speech.ids(tmp_path / "run.jsonl") == speech.ids(undisturbed[2].with_suffix(".jsonl"))
    recorded = checkpoints.newest(tmp_path / "run").position
    assert recorded.bad == len(recorded.bad_windows) == summary["bad_windows"]
    assert {row["utterance"] for row in recorded.bad_windows} == {number}
    assert summary["audio_s"] < undisturbed[0]["audio_s"]


def test_too_many_windows_that_do_not_decode_stop_the_run_in_one_line(shards, tmp_path):
    data = Data(speech.spoil(shards, tmp_path / "spoilt", range(0, 30, 2)), {})
    with pytest.raises(UserError, match=r"windows do not decode, past feed\.bad_budget=0\.01") as refusal:
        run(short(tmp_path / "run"), data, tmp_path / "run")
    assert "\n" not in str(refusal.value)


def test_bad_windows_are_listed_with_shard_key_and_cause_and_the_worst_shards_are_named(shards, tmp_path):
    data = Data(speech.spoil(shards, tmp_path / "spoilt", range(0, 30, 2)), {})
    with pytest.raises(UserError, match=r"unreadable, most of them in shard-\d{6}\.tar \(\d+\)"):
        run(short(tmp_path / "stopped"), data, tmp_path / "stopped")
    _, watcher = run(short(tmp_path / "run", feed__bad_budget=1), data, tmp_path / "run")
    assert watcher.bad
    by_step = speech.ids(tmp_path / "run.jsonl")
    for row in watcher.bad:
        assert row["cause"] == "unreadable"
        assert row["key"] == data.train.key(row["utterance"])
        assert row["shard"] == Path(data.train.url(int(data.train.shard_of(row["utterance"])))).name
        # The update that met it, as train.log_window_ids numbers them.
        assert f"{row['key']}#{row['number']}" in by_step[row["step"]]


def test_a_run_takes_over_an_index_with_excluded_utterances_in_its_middle(undisturbed, shards, tmp_path):
    target = Path(shutil.copytree(shards / "train", tmp_path / "set"))
    recipe = short(tmp_path / "run")
    with pytest.raises(speech.Killed):
        run(recipe, Data(Index.load(str(target)), {}), tmp_path / "run", speech.Watcher(5))
    before = Index.load(str(target))
    coming = speech.ids(undisturbed[2].with_suffix(".jsonl"))[9]
    exclude(before, sorted({name.partition("#")[0] for name in coming[:3]}))
    after = Index.load(str(target))
    summary, _ = run(recipe, Data(after, {}), tmp_path / "run")
    assert speech.ids(tmp_path / "run.jsonl") == speech.ids(undisturbed[2].with_suffix(".jsonl"))
    assert summary["audio_s"] < undisturbed[0]["audio_s"]
    assert summary["bad_windows"] == 0
    assert checkpoints.newest(tmp_path / "run").position.fingerprint == after.fingerprint
    # The other way round is another data set.
    with pytest.raises(UserError, match="another shard set"):
        run(recipe, Data(before, {}), tmp_path / "run")


def test_appended_shards_come_in_at_the_edge_of_an_epoch_and_only_when_asked(shards, tmp_path):
    whole = Index.load(str(shards / "train"))
    entries = [
        ShardEntry(row["path"], row["sha256"], row["bytes"], whole.rows(number).table)
        for number, row in enumerate(whole.shards.to_pylist())
    ]
    target = Path(shutil.copytree(shards / "train", tmp_path / "set"))
    with IndexWriter(str(target)) as writer:
        for entry in entries[:-1]:
            writer.add(entry)
        before = writer.publish()
    long = {"train__epochs": 3, "train__steps": 0, "window__seconds": 4.0}
    recipe = short(tmp_path / "run", **long)
    with pytest.raises(speech.Killed):
        run(recipe, Data(before, {}), tmp_path / "run", speech.Watcher(3))
    with IndexWriter(str(target), after=before) as writer:
        writer.add(entries[-1])
        after = writer.publish()
    with pytest.raises(UserError, match=r"1 shards more .*: set data\.append=true"):
        run(recipe, Data(after, {}), tmp_path / "run")
    for stop in (9, 0):
        # Stopped once more behind the edge, and gone on with without the flag being needed again.
        with contextlib.suppress(speech.Killed):
            run(recipe, Data(after, {}, append=stop == 9), tmp_path / "run", speech.Watcher(stop))
    by_epoch: dict[int, list[str]] = {}
    for line in (tmp_path / "run.jsonl").read_text().splitlines():
        step = json.loads(line)
        by_epoch.setdefault(step["epoch"], []).extend(step["ids"])
    every = [
        sorted(
            f"{key}#{number}"
            for key, windows in zip(
                index.utterances["key"].to_pylist(), window.count(recipe.window, index.samples), strict=True
            )
            for number in range(windows)
        )
        for index in (before, after)
    ]
    assert [sorted(by_epoch[epoch]) for epoch in range(3)] == [every[0], every[1], every[1]]
    run(short(tmp_path / "other", **long), Data(before, {}), tmp_path / "other")
    ids = [speech.ids(tmp_path / f"{name}.jsonl") for name in ("run", "other")]
    first = [step for step in ids[1] if step <= len(ids[1]) // 3]
    assert [ids[0][step] for step in first] == [ids[1][step] for step in first]


def test_updates_that_are_not_finite_stop_the_run_past_their_budget(shards, tmp_path):
    recipe = short(tmp_path / "run", optim__learning_rate=1e30, train__nonfinite_budget=3)
    watcher = speech.Watcher()
    with pytest.raises(UserError, match=r"4 updates .* train\.nonfinite_budget=3: lower optim\.learning_rate"):
        run(recipe, shards, tmp_path / "run", watcher)
    assert max(watcher.losses) == 4, "one update to leave the finite numbers, then three that the budget lets pass"


def test_a_validation_is_the_same_at_every_visit_and_in_any_pieces(shards, tmp_path):
    """A rate of 0 leaves the network as it was, so that only the validation could change."""
    data = speech.data(shards, validate=True)
    frozen = {"optim__learning_rate": 0, "train__steps": 2}
    scores = []
    for number, pieces in enumerate((0, 3)):
        recipe = short(tmp_path / "run", **frozen, train__micro_batch=pieces)
        scores.append(run(recipe, data, tmp_path / f"run{number}")[0])
    for name in ("heldout", "unseen"):
        assert scores[0][name] == pytest.approx(scores[1][name], abs=1e-6)
        assert {"loss", "accuracy_mean", "loss_k01", "accuracy_k04"} <= set(scores[0][name])


def test_ids_go_into_no_place_that_is_not_theirs(shards, tmp_path):
    with pytest.raises(UserError, match=r"train\.log_window_ids=s3://bucket/ids is not on a local disk"):
        speech.recipe(train__log_window_ids="s3://bucket/ids")
    notes = {"prose.txt": "one line", "table.csv": "a,b\n1,2\n", "other.jsonl": '{"a": 1}\n', "list.jsonl": "[1]\n{}"}
    for name, text in notes.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=r"cannot hold window ids .* name another file") as refusal:
            run(short(tmp_path / "run", train__log_window_ids=tmp_path / name), shards, tmp_path / "run")
        assert "\n" not in str(refusal.value)
        assert (tmp_path / name).read_text() == text
    with pytest.raises(UserError, match="cannot hold window ids"):
        run(short(tmp_path / "run", train__log_window_ids=tmp_path), shards, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_small_run_leaves_chance_within_50_steps(tmp_path_factory, shards):
    """The quickstart's recipe on a few minutes of speech: nothing learns when frames start alike."""
    recipe = speech.recipe(
        window__seconds=1.28,
        model__encoder__channels=64,
        model__context__width=64,
        model__predictor__steps=12,
        objective__negatives=50,
        objective__score="cosine",
        objective__temperature=0.1,
        optim__learning_rate=1e-3,
        train__steps=50,
        train__batch=8,
    )
    summary, _ = run(recipe, speech.data(shards, validate=True), tmp_path_factory.mktemp("chance") / "run")
    chance = summary["accuracy_chance"]
    for name in ("heldout", "unseen"):
        assert summary[name]["accuracy_k01"] > 4 * chance, name
        assert summary[name]["accuracy_mean"] > 1.5 * chance, name
