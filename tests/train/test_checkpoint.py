import hashlib
import json
import logging
import pickle
from pathlib import Path

import batches
import pytest
import speech
import torch

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.model.cpc import build
from cpcscale.train.checkpoint import MARKER, Checkpoints, Position, load_encoder, read, restore
from cpcscale.train.ranks import Ranks
from cpcscale.train.step import TrainStep

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", MARKER)
RECIPE = speech.recipe()


def trained(updates: int, seed: int = 0) -> TrainStep:
    model = build(RECIPE.model, seed, offset=0.125, gain=7.0)
    step = TrainStep(model, RECIPE, Ranks(0, 1, 1, torch.device("cpu")))
    for t in range(updates):
        step(batches.made(seed=t), t)
    return step


def position(step: int, **rest: object) -> Position:
    return Position(step=step, fingerprint="f" * 64, identity=RECIPE.identity(), **rest)


def save(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(str(folder), keep)
    for step in steps:
        checkpoints.save(trained(0, seed=step).model, trained(0).optimizer, position(step))
    return checkpoints


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    match how:
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "truncated":
            file.write_bytes(data[: len(data) // 2])
        case "one bit flipped":
            middle = len(data) // 2
            file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


def test_a_round_trip_gives_back_every_bit_of_weights_optimiser_and_position(tmp_path):
    step = trained(3)
    where = position(3, cursors=[[0, 24], [1, 2]], audio_s=0.1 + 0.2, skipped=1, metrics={"loss": 1 / 3})
    url = Checkpoints(str(tmp_path)).save(step.model, step.optimizer, where)

    restored, fresh = Checkpoints(str(tmp_path)).newest(), trained(0, seed=9)
    restore(restored, fresh.model, fresh.optimizer)
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


def test_the_update_after_a_restore_is_the_update_without_it(tmp_path):
    step, fresh = trained(3), trained(0, seed=9)
    Checkpoints(str(tmp_path)).save(step.model, step.optimizer, position(3))
    restore(Checkpoints(str(tmp_path)).newest(), fresh.model, fresh.optimizer)
    for run in (step, fresh):
        run(batches.made(seed=3), 3)
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], tensor), name


def test_a_checkpoint_before_the_first_update_that_counted_is_whole(tmp_path):
    step, fresh = trained(0), trained(2, seed=9)
    Checkpoints(str(tmp_path)).save(step.model, step.optimizer, position(1, skipped=1))
    restore(Checkpoints(str(tmp_path)).newest(), fresh.model, fresh.optimizer)
    assert fresh.optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "one bit flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_torn_checkpoint_is_skipped_with_a_line_and_the_one_before_is_used(tmp_path, caplog, name, how):
    checkpoints = save(tmp_path, 4, 8)
    damage(Path(checkpoints.at(8)) / name, how)
    with caplog.at_level(logging.WARNING):
        restored = checkpoints.newest()
    assert restored.position.step == 4
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "step-00000008" in lines[0] and "\n" not in lines[0]


def test_when_all_are_torn_there_is_none(tmp_path):
    checkpoints = save(tmp_path, 4, 8)
    for step in (4, 8):
        damage(Path(checkpoints.at(step)) / "state.json", "truncated")
    assert checkpoints.newest() is None
    assert Checkpoints(str(tmp_path / "nowhere")).newest() is None


def test_a_store_that_fails_is_not_taken_for_a_torn_checkpoint(tmp_path):
    """Going on from an older checkpoint, or from the start, because a read failed would throw work away unsaid."""
    checkpoints = save(tmp_path, 4, 8)
    state = Path(checkpoints.at(8)) / "state.json"
    state.unlink()
    state.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.newest()


def test_a_save_that_fails_half_way_publishes_nothing(tmp_path):
    checkpoints = save(tmp_path, 4)
    (Path(checkpoints.at(8)) / "state.json").mkdir(parents=True)
    with pytest.raises(UserError):
        save(tmp_path, 8)
    assert checkpoints.steps() == [4]


def test_saving_a_step_again_replaces_a_torn_checkpoint_of_it(tmp_path):
    checkpoints = save(tmp_path, 4, 8)
    damage(Path(checkpoints.at(8)) / "optimizer.safetensors", "truncated")
    save(tmp_path, 8)
    assert checkpoints.newest().position.step == 8


def test_the_newest_k_and_the_best_by_heldout_loss_stay(tmp_path):
    checkpoints, step = Checkpoints(str(tmp_path), keep=2), trained(0)
    losses = {1: 5.0, 2: 3.0, 3: float("nan"), 4: None, 5: 4.0, 6: 4.5}
    for number, loss in losses.items():
        metrics = {} if loss is None else {"heldout_loss": loss}
        checkpoints.save(step.model, step.optimizer, position(number, metrics=metrics))
    assert checkpoints.steps() == [2, 5, 6]
    assert {path.name for path in Path(checkpoints.folder).iterdir()} == {
        "best.json",
        *(f"step-0000000{step}" for step in (2, 5, 6)),
    }
    checkpoints.save(step.model, step.optimizer, position(7, metrics={"heldout_loss": 2.0}))
    assert checkpoints.steps() == [6, 7]


def test_a_first_heldout_loss_that_is_not_finite_is_never_the_best(tmp_path):
    checkpoints, step = Checkpoints(str(tmp_path), keep=1), trained(0)
    for number, loss in enumerate((float("nan"), 3.0, 4.0), start=1):
        checkpoints.save(step.model, step.optimizer, position(number, metrics={"heldout_loss": loss}))
    assert checkpoints.steps() == [2, 3]


def test_a_damaged_note_of_the_best_does_not_stop_a_run(tmp_path):
    checkpoints = save(tmp_path, 1)
    (tmp_path / "checkpoints" / "best.json").write_text("{")
    save(tmp_path, 2)
    assert checkpoints.steps() == [1, 2]


def test_torn_checkpoints_ahead_of_the_run_do_not_push_out_whole_ones(tmp_path):
    checkpoints = save(tmp_path, 4, 8)
    damage(Path(checkpoints.at(8)) / "state.json", "truncated")
    save(tmp_path, 5, keep=1)
    assert checkpoints.newest().position.step == 5


def test_an_encoder_is_loaded_from_a_run_or_from_one_checkpoint(tmp_path):
    checkpoints = save(tmp_path, 4, 8)
    for url, step in ((str(tmp_path), 8), (checkpoints.at(4), 4)):
        model, metadata = load_encoder(url)
        assert (metadata["step"], metadata["url"]) == (step, checkpoints.at(step))
        assert set(metadata) == {"url", "step", "fingerprint", "audio_s", "identity"}
        expected = trained(0, seed=step).model.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        assert (model.offset.item(), model.gain.item()) == (0.125, 7.0)


def test_loading_an_encoder_leaves_the_global_generator_alone(tmp_path):
    save(tmp_path, 4)
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
    url = save(tmp_path, 4).at(4)
    damage(Path(url) / "model.safetensors", "one bit flipped")
    with pytest.raises(UserError, match=r"torn: model\.safetensors"):
        load_encoder(url)


def test_a_checkpoint_of_a_newer_format_is_refused_and_no_older_one_is_taken_for_it(tmp_path):
    checkpoints = save(tmp_path, 4, 8)
    rewrite(Path(checkpoints.at(8)), "state.json", lambda data: data.replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(UserError, match="upgrade"):
        checkpoints.newest()


def test_checkpoints_in_an_object_store_keep_the_same_promises(s3):
    base = f"{s3.base}/checkpoint-run"
    checkpoints, step = Checkpoints(base, keep=2), trained(2)
    assert checkpoints.newest() is None
    for number, loss in ((1, 2.0), (2, 3.0), (3, 3.0), (4, 3.0)):
        checkpoints.save(step.model, step.optimizer, position(number, metrics={"heldout_loss": loss}))
    assert checkpoints.steps() == [1, 3, 4]
    storage.remove(storage.join(checkpoints.at(4), "optimizer.safetensors"))
    restored = checkpoints.newest()
    assert restored.position.step == 3
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(restored.model[name], tensor), name
    assert load_encoder(base)[1]["step"] == 3


def test_nothing_is_unpickled(tmp_path):
    trap = tmp_path / "trap"

    class Payload:
        def __reduce__(self):
            return Path.touch, (trap,)

    checkpoints = save(tmp_path, 4)
    for name in FILES[:2]:
        save(tmp_path, 4)
        rewrite(Path(checkpoints.at(4)), name, lambda _: pickle.dumps(Payload()))
        with pytest.raises(UserError, match="cannot be read"):
            read(checkpoints.at(4))
    assert not trap.exists()


def rewrite(folder: Path, name: str, change) -> None:
    """Changes a file and its hash in the marker: a checkpoint that is whole, but made by somebody else."""
    data = change((folder / name).read_bytes())
    (folder / name).write_bytes(data)
    marker = json.loads((folder / MARKER).read_text())
    marker[name] = hashlib.sha256(data).hexdigest()
    (folder / MARKER).write_text(json.dumps(marker))
