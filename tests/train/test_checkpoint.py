import hashlib
import json
import logging
import pickle
from pathlib import Path

import batches
import pytest
import speech
import torch
from checkpoints import DAMAGES, FILES, RECIPE, damage, newest, position, publish, published, steps, trained

from cpcscale import config, storage
from cpcscale.errors import UserError
from cpcscale.runs.checkpoint_files import MARKER, TornError
from cpcscale.runs.ledger import Ledger
from cpcscale.runs.publisher import Publisher
from cpcscale.train.checkpoint import checkpoint_files_of, collect_tensors, load_checkpoint, load_encoder, restore


def test_a_round_trip_gives_back_every_bit_of_weights_optimiser_and_position(tmp_path):
    step = trained(3)
    where = position(3, cursors=[[0, 24], [1, 2]], audio_s=0.1 + 0.2, skipped=1, metrics={"loss": 1 / 3})
    url = publish(tmp_path, where, step)

    restored, fresh = newest(tmp_path), trained(0, seed=9)
    restore(restored, fresh.contrast, fresh.optimizer)
    assert restored.url == url
    assert restored.position == where
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], tensor), name
    before, after = step.optimizer.state_dict(), fresh.optimizer.state_dict()
    assert before["state"].keys() == after["state"].keys()
    for number, entry in before["state"].items():
        assert {"step", "exp_avg", "exp_avg_sq"} == set(entry)
        for key, value in entry.items():
            assert torch.equal(after["state"][number][key], value)
            assert after["state"][number][key].dtype == value.dtype


def test_a_learnt_temperature_goes_on_from_where_it_was(tmp_path):
    spec = speech.recipe(objective__score="cosine", objective__learn_temperature=True)
    step, fresh = (trained(updates, spec=spec) for updates in (3, 0))
    assert not torch.equal(step.contrast.heads["infonce"].log_scale, fresh.contrast.heads["infonce"].log_scale)
    publish(tmp_path, position(3, identity=spec.identity()), step)
    restore(newest(tmp_path), fresh.contrast, fresh.optimizer)
    assert torch.equal(step.contrast.heads["infonce"].log_scale, fresh.contrast.heads["infonce"].log_scale)


def test_the_update_after_a_restore_is_the_update_without_it(tmp_path):
    step, fresh = trained(3), trained(0, seed=9)
    publish(tmp_path, position(3), step)
    restore(newest(tmp_path), fresh.contrast, fresh.optimizer)
    for run in (step, fresh):
        run(batches.made(seed=3), 3)
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], tensor), name


def test_a_checkpoint_before_the_first_update_that_counted_is_whole(tmp_path):
    step, fresh = trained(0), trained(2, seed=9)
    publish(tmp_path, position(1, skipped=1), step)
    restore(newest(tmp_path), fresh.contrast, fresh.optimizer)
    assert fresh.optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_torn_checkpoint_is_skipped_with_a_line_and_the_one_before_is_used(tmp_path, caplog, name, how):
    damage(published(tmp_path, 4, 8)[1] / name, how)
    with caplog.at_level(logging.WARNING):
        restored = newest(tmp_path)
    assert restored.position.step == 4
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "step-00000008" in lines[0] and "\n" not in lines[0]


def test_when_all_are_torn_there_is_none(tmp_path):
    for place in published(tmp_path, 4, 8):
        damage(place / "state.json", "truncated")
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None


def test_a_store_that_fails_is_not_taken_for_a_torn_checkpoint(tmp_path):
    """Going on from an older checkpoint, or from the start, because a read failed would throw work away unsaid."""
    state = published(tmp_path, 4, 8)[1] / "state.json"
    state.unlink()
    state.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        newest(tmp_path)


def test_a_save_that_fails_half_way_publishes_nothing(tmp_path):
    published(tmp_path, 4)
    # The next process has this number.
    (tmp_path / "checkpoints" / "step-00000008-0003" / "state.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"step-00000008-0003/state\.json cannot be"):
        published(tmp_path, 8)
    assert steps(tmp_path) == [4]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004-0001"]


def test_a_torn_checkpoint_makes_way_for_a_new_one_of_its_step(tmp_path):
    places = published(tmp_path, 4, 8)
    damage(places[1] / "optimizer.safetensors", "truncated")
    [again] = published(tmp_path, 8)
    assert newest(tmp_path).url == str(again)
    assert not places[1].exists()


def test_torn_checkpoints_ahead_of_the_run_do_not_push_out_whole_ones(tmp_path):
    places = published(tmp_path, 4, 8)
    damage(places[1] / "state.json", "truncated")
    published(tmp_path, 5, keep=1)
    assert newest(tmp_path).position.step == 5


def test_further_tensors_travel_with_a_checkpoint_and_their_absence_is_no_tear(tmp_path):
    step, mean = trained(1), torch.arange(3.0)
    ledger = Ledger(str(tmp_path))
    publisher = Publisher(ledger, ledger.head(), 0, keep=9)
    for number, more in ((4, {"ema": {"mean": mean}}), (8, {})):
        files = checkpoint_files_of(
            {**collect_tensors(step.contrast, step.optimizer), **more}, position(number), RECIPE
        )
        publisher.publish(number, None, files)
    assert newest(tmp_path).tensors.keys() == {"model", "objective", "optimizer"}
    first = load_checkpoint(ledger.url(ledger.head().checkpoints[0]))
    assert torch.equal(first.tensors["ema"]["mean"], mean)
    damage(Path(first.url) / "ema.safetensors", "one bit flipped")
    with pytest.raises(TornError, match=r"ema\.safetensors does not match"):
        load_checkpoint(first.url)


def test_a_checkpoint_says_what_config_it_is_of(tmp_path):
    [place] = published(tmp_path, 4)
    state = json.loads((place / "state.json").read_text())
    assert state["config"]["train"]["batch"] == 16
    assert state["config_hash"] == config.digest(RECIPE)


def test_an_encoder_is_loaded_from_a_run_or_from_one_checkpoint(tmp_path):
    places = published(tmp_path, 4, 8)
    for url, step, place in ((str(tmp_path), 8, places[1]), (str(places[0]), 4, places[0])):
        model, metadata = load_encoder(url)
        assert (metadata["step"], metadata["url"]) == (step, str(place))
        assert set(metadata) == {"url", "step", "fingerprint", "audio_s", "identity", "chosen", "probe_set"}
        expected = trained(0, seed=step).model.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        assert (model.offset.item(), model.gain.item()) == (0.125, 7.0)


def test_loading_an_encoder_leaves_the_global_generator_alone(tmp_path):
    published(tmp_path, 4)
    before = torch.get_rng_state()
    load_encoder(str(tmp_path))
    assert torch.equal(before, torch.get_rng_state())


def test_a_missing_encoder_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "nowhere", tmp_path / "empty", Path(__file__)):
        with pytest.raises(UserError, match=r"no checkpoint at .*name the run_dir") as refusal:
            load_encoder(str(place))
        assert "\n" not in str(refusal.value)


def test_a_torn_checkpoint_named_by_itself_is_refused(tmp_path):
    [place] = published(tmp_path, 4)
    damage(place / "model.safetensors", "one bit flipped")
    with pytest.raises(UserError, match=r"torn: model\.safetensors"):
        load_encoder(str(place))


def test_a_checkpoint_of_a_newer_format_is_refused_and_no_older_one_is_taken_for_it(tmp_path):
    marker = published(tmp_path, 4, 8)[1] / MARKER
    for other in ('{"state.json": "0123"}', marker.read_text().replace('"format": 2', '"format": 3')):
        marker.write_text(other)
        with pytest.raises(UserError, match=r"has checkpoint format [13], this cpcscale reads 2"):
            newest(tmp_path)


def test_a_marker_names_files_of_its_own_folder_alone(tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    [place] = published(tmp_path / "run", 4)
    marker = json.loads((place / MARKER).read_text())
    marker["files"]["../../../secret.json"] = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (place / MARKER).write_text(json.dumps(marker))
    with pytest.raises(TornError, match=r"COMPLETE\.json is damaged"):
        load_checkpoint(str(place))


def test_checkpoints_in_an_object_store_keep_the_same_promises(s3):
    base = f"{s3.base}/checkpoint-run"
    step = trained(2)
    assert newest(base) is None
    for number, loss in ((1, 2.0), (2, 3.0), (3, 3.0), (4, 3.0)):
        last = publish(base, position(number, metrics={"heldout_loss": loss}), step, keep=2)
    assert steps(base) == [1, 3, 4]
    assert {name.partition("-")[2][:8] for name in storage.list_files(f"{base}/checkpoints")} == {
        "00000001",
        "00000003",
        "00000004",
    }
    storage.remove(storage.join(last, "optimizer.safetensors"))
    restored = newest(base)
    assert restored.position.step == 3
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(restored.tensors["model"][name], tensor), name
    assert load_encoder(base)[1]["step"] == 3


def test_nothing_is_unpickled(tmp_path):
    trap = tmp_path / "trap"

    class Payload:
        def __reduce__(self):
            return Path.touch, (trap,)

    for name in FILES[:3]:
        [place] = published(tmp_path, 4)
        rewrite(place, name, lambda _: pickle.dumps(Payload()))
        with pytest.raises(UserError, match="cannot be read"):
            load_checkpoint(str(place))
    assert not trap.exists()


def rewrite(folder: Path, name: str, change) -> None:
    """Changes a file and its hash in the marker: a checkpoint that is whole, but made by somebody else."""
    data = change((folder / name).read_bytes())
    (folder / name).write_bytes(data)
    marker = json.loads((folder / MARKER).read_text())
    marker["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MARKER).write_text(json.dumps(marker))
