"""Real processes over gloo: what a run computes does not depend on how many ranks share the work."""

import shutil
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import speech
import torch
import worlds

from cpcscale.train.checkpoint import load_encoder
from cpcscale.train.loop import pretrain
from cpcscale.train.ranks import Ranks

WORLDS = (1, 2, 3, 4)
SEVERAL = (2, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def found(shards: Path, folder: Path) -> dict[int, list[dict[str, Any]]]:
    """world -> what each of its ranks found; `resumed` goes on from step 5 of a run of one rank."""
    recipe = worlds.recipe(folder, "begun")
    with pytest.raises(speech.Killed):
        data = speech.data(shards, validate=True)
        pretrain(recipe, data, str(folder / "begun"), Ranks.current(torch.device("cpu")), speech.Watcher(7))
    for world in WORLDS:
        shutil.copytree(folder / "begun", folder / f"resumed-{world}")
        shutil.copy(folder / "begun.jsonl", folder / f"resumed-{world}.jsonl")
    return {world: worlds.found(world, shards, folder) for world in WORLDS}


def test_every_rank_knows_its_place(found):
    for world in WORLDS:
        assert [rank["ranks"] for rank in found[world]] == [[rank, world, world] for rank in range(world)]


@pytest.mark.parametrize("objective", [*worlds.OBJECTIVES, *worlds.SUMS])
@pytest.mark.parametrize("world", WORLDS)
def test_loss_and_gradient_do_not_depend_on_the_split_over_ranks_and_micro_batches(found, world, objective):
    """8 rows at 1 x 8, 2 x 4 and 3, 3, 2, of which rank 2's are padding and bad alone, and 4 x 2; at once, in micro-
    batches of two and of one; to 1e-5 of the largest value."""
    whole = found[1][0]["split"][objective][0]
    for rank in found[world]:
        for split in rank["split"][objective]:
            assert split["scores"] == pytest.approx(whole["scores"], rel=1e-5, abs=1e-6)
            for name in ("count", "samples", "bad", "empty"):
                assert split[name] == whole[name]
            for name, gradient in split["gradients"].items():
                largest = whole["gradients"][name].abs().max().item()
                assert largest > 0 or (name.startswith("model.predictor") and "without" in objective), name
                torch.testing.assert_close(gradient, whole["gradients"][name], rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("world", SEVERAL)
def test_all_ranks_hold_the_same_weights_after_an_update_bit_for_bit(found, world):
    for objective in (*worlds.OBJECTIVES, *worlds.SUMS):
        first, *others = (rank["split"][objective] for rank in found[world])
        for other in others:
            for one, two in zip(first, other, strict=True):
                assert all(torch.equal(one["weights"][name], tensor) for name, tensor in two["weights"].items())


@pytest.mark.parametrize("world", WORLDS)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all(found, world):
    for rank in found[world]:
        before, skipped, after = rank["infinite"]["weights"]
        assert rank["infinite"]["skipped"] == [False, True, False]
        assert torch.equal(before, skipped)
        assert not torch.equal(skipped, after)
        assert after.isfinite().all()


@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_stop_at_the_same_step_when_no_update_is_finite(found, world):
    lines = {rank["stopped"][0] for rank in found[world]}
    assert len(lines) == 1
    assert "train.nonfinite_budget=2" in lines.pop()
    assert found[world][0]["stopped"][1] == found[1][0]["stopped"][1] == 3


@pytest.mark.parametrize("world", WORLDS)
def test_what_rank_0_is_asked_is_done_by_all_ranks_at_the_same_step_and_what_others_are_asked_is_not(
    found, folder, world
):
    lines = {rank["noticed"] for rank in found[world]}
    assert lines == {f"stopped after step 5 of {worlds.STEPS}, with a checkpoint of it"}
    assert checkpoints.steps(folder / f"noticed-{world}") == [3, 5]


@pytest.mark.parametrize("world", SEVERAL)
def test_a_front_end_is_calibrated_alike_by_any_number_of_ranks(found, folder, world):
    one, other = (load_encoder(str(folder / f"noticed-{each}"))[0].constants for each in (1, world))
    assert one["encoder.front.mean"].abs().max() > 1, "it was measured"
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize("world", WORLDS)
def test_the_ids_of_every_global_batch_are_those_of_one_rank(found, folder, world):
    expected = speech.ids(folder / "whole-1.jsonl")
    assert len(expected) == worlds.STEPS
    assert min(len(ids) for ids in expected.values()) < 16, "one batch is partly padding"
    assert speech.ids(folder / f"whole-{world}.jsonl") == expected


@pytest.mark.parametrize("world", WORLDS)
def test_a_run_resumed_at_another_number_of_ranks_gives_the_same_batches_and_losses(found, folder, world):
    whole, resumed = found[1][0]["whole"], found[world][0]["resumed"]
    assert speech.ids(folder / f"resumed-{world}.jsonl") == speech.ids(folder / "whole-1.jsonl")
    assert min(resumed["losses"]) == worlds.STOP + 1
    expected = {step: whole["losses"][step] for step in resumed["losses"]}
    assert resumed["losses"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_losses_and_heldout_scores_do_not_depend_on_the_number_of_ranks(found, world):
    whole, other = found[1][0]["whole"], found[world][0]["whole"]
    assert other["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    for name in ("heldout", "unseen"):
        assert other["summary"][name] == pytest.approx(whole["summary"][name], abs=1e-4)
    for name in ("audio_s", "bad_windows", "skipped_updates"):
        assert other["summary"][name] == pytest.approx(whole["summary"][name])


@pytest.mark.parametrize("world", SEVERAL)
def test_every_rank_states_one_summary_and_the_first_alone_watches_and_saves(found, world):
    for kind in ("whole", "resumed"):
        first, *others = (rank[kind] for rank in found[world])
        assert first["losses"] and first["saves"]
        for other in others:
            rates = {name: other["summary"][name] for name in ("audio_s_per_s", "data_wait_share", "time", "hidden")}
            assert other["summary"] == first["summary"] | rates
            assert not other["losses"] and not other["saves"]


def test_the_exchange_between_ranks_is_in_the_account_and_a_rank_alone_has_none(found):
    for world in WORLDS:
        for rank in found[world]:
            summary = rank["whole"]["summary"]
            assert sum(summary["time"].values()) == pytest.approx(1.0)
            assert (summary["hidden"]["allreduce"] > 0) == (world > 1)
            if world > 1:
                assert summary["time"]["allreduce"] > 0.01


@pytest.mark.parametrize("world", WORLDS)
def test_what_ranks_say_to_each_other(found, world):
    for number, rank in enumerate(found[world]):
        # Over the default group, and over one of the hosts' own, as where the default is of GPUs.
        for talk in rank["talk"].values():
            assert talk["sum"] == [sum(range(world)), world]
            assert talk["given"] == [number, 1], "the caller's tensor is left alone"
            assert talk["chosen"] == "of rank 0"
            assert talk["gathered"] == [{"rank": each} for each in range(world)]
