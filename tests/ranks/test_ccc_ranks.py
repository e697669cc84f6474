"""Real processes over gloo: a recogniser's loss, gradient, weights and predictions do not depend on how many ranks
share each batch, nor on micro-batches, with dropout on; the mean over ranks of their own CCCs is another loss.
"""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cpcscale.emotion import batching
from cpcscale.emotion.heads.attention import AttentionHead, AttentionHeadConfig, EncoderWithHead
from cpcscale.emotion.heads.training import FitConfig, HeadTraining, TrainingExamples
from cpcscale.model.context import ContextConfig
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.model.encoder import EncoderConfig
from cpcscale.objective.ccc import ccc_loss
from cpcscale.train.ranks import Ranks

WIDTH = 5
# (ranks, micro_batch). Of three ranks' 11, 11 and 10 rows, 10 would be one rank's all; 5 makes two micro-batches of one
# rank's and three of the others'.
SPLITS = [(1, 0), (1, 8), (2, 0), (2, 4), (2, 5), (3, 0), (3, 4), (3, 5), (3, 10)]
SHARES = {"sorted": 2.0, "random": 1.0}


def found(world: int, folder: Path) -> list[dict[str, Any]]:
    """What each of `world` ranks found."""
    if world == 1:
        _work(0, 1, folder)
    else:
        multiprocessing.set_forkserver_preload(["cpcscale.emotion.heads.training", "torch._dynamo"])
        mp.start_processes(_work, (world, folder), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def _work(rank: int, world: int, folder: Path) -> None:
    if world > 1:
        meeting = f"file://{folder}/meeting-{world}"
        dist.init_process_group("gloo", meeting, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    ranks = Ranks.current(torch.device("cpu"))
    try:
        results = {
            "head": {micro: _update(_head(rank).double(), _features(32), ranks, micro) for micro in (0, 4, 5, 8, 10)},
            "encoder": {micro: _update(_end_to_end(rank), _waves(12), ranks, micro) for micro in (0, 2, 4)},
            "few": _update(_head(rank).double(), _features(2), ranks, 0),
            "thawed": _thawed(ranks),
            "mean of ranks": {shares: _mean_of_ranks(ranks, shares) for shares in SHARES},
            "predicted": torch.from_numpy(batching.predict(_head(0).double(), _cut(), ranks.device, ranks)),
        }
        torch.save(results, folder / f"{world}-{rank}.pt")
    finally:
        if world > 1:
            dist.destroy_process_group()


def _head(seed: int) -> AttentionHead:
    with batching.seeded(seed, "head"):
        return AttentionHead(AttentionHeadConfig(heads=2, hidden=16, dense=16), WIDTH)


def _end_to_end(seed: int) -> EncoderWithHead:
    """Another seed on every rank but the first: only rank 0's weights may count."""
    model = ModelConfig(encoder=EncoderConfig(channels=4), context=ContextConfig(width=WIDTH))
    network = EncoderWithHead(build(model, seed=seed, gain=10.0), _head(seed))
    network.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(), *inputs[1:]))
    return network.double()


def _features(count: int) -> TrainingExamples:
    """Long enough for several groups of like length a rank."""
    rng = np.random.default_rng(0)
    inputs = [rng.normal(0, 1, (int(rng.integers(100, 500)), WIDTH)).astype(np.float32) for _ in range(count)]
    return TrainingExamples(inputs, rng.uniform(-1, 1, (count, 3)), [f"u{number}" for number in range(count)])


def _waves(count: int) -> TrainingExamples:
    rng = np.random.default_rng(0)
    inputs = [rng.integers(-3000, 3000, int(rng.integers(800, 16_000))).astype(np.int16) for _ in range(count)]
    return TrainingExamples(inputs, rng.uniform(-1, 1, (count, 3)))


def _cut() -> list[tuple[np.ndarray, ...]]:
    """Five utterances of one to three windows."""
    return [tuple(_features(7).inputs[start : start + 1 + start % 3]) for start in range(5)]


def _update(network: torch.nn.Module, data: TrainingExamples, ranks: Ranks, micro_batch: int) -> dict[str, Any]:
    """One update whose batch is all of `data`, and the epoch's development score."""
    settings = FitConfig(epochs=1, batch=len(data.inputs), micro_batch=micro_batch, device="cpu")
    (epoch,) = HeadTraining(network, data, data, settings, seed=0, encoder_rate=1e-3, ranks=ranks)
    return {
        "loss": epoch.train_loss,
        "dev": epoch.dev_ccc,
        "gradients": {name: each.grad for name, each in network.named_parameters() if each.grad is not None},
        "weights": {name: tensor.clone() for name, tensor in network.state_dict().items()},
    }


def _thawed(ranks: Ranks) -> dict[str, Any]:
    """Four epochs of three updates, of which ranks have unequal shares; the encoder thaws in the third."""
    network, data = _end_to_end(0), _waves(12)
    settings = FitConfig(epochs=4, batch=4, thaw_epoch=3, micro_batch=1, clip_norm=0.5, device="cpu")
    first = network.encoder.encoder.layers[0].weight
    levels, losses = [first.detach().clone()], []
    for epoch in HeadTraining(network, data, data, settings, seed=0, encoder_rate=1e-3, ranks=ranks):
        levels.append(first.detach().clone())
        losses.append(epoch.train_loss)
    return {"levels": levels, "losses": losses}


def _mean_of_ranks(ranks: Ranks, shares: str) -> dict[str, torch.Tensor]:
    """The gradient that DDP averages when each rank takes the CCC of its own rows: `sorted` ones, as of shards that
    are, or `random` ones.
    """
    network, data = _head(0).double().eval(), _features(32)
    order = np.argsort(data.truth_UP[:, 0]) if shares == "sorted" else np.arange(32)
    own = np.array_split(order, ranks.world)[ranks.rank]
    guess_BP = batching.by_length(ranks.wrap_ddp(network), [data.inputs[row] for row in own], ranks.device)
    ccc_loss(guess_BP, torch.from_numpy(data.truth_UP[own]), (1 / 3, 1 / 3, 1 / 3)).backward()
    return {name: each.grad for name, each in network.named_parameters()}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ccc")
    return {world: found(world, folder) for world in (1, 2, 3)}


def _furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference of any gradient, as a share of the largest value of all."""
    assert left.keys() == right.keys()
    largest = max(float(tensor.abs().max()) for tensor in left.values())
    return max(float((left[name] - right[name]).abs().max()) for name in left) / largest


@pytest.mark.parametrize(("world", "micro_batch"), SPLITS)
def test_loss_and_gradient_of_32_utterances_do_not_depend_on_the_split_with_dropout_on(worlds, world, micro_batch):
    """1 x 32, 4 x 8 in turn, 2 ranks x 16, and others: to 1e-12 of the largest gradient, in float64."""
    whole = worlds[1][0]["head"][0]
    for rank in worlds[world]:
        split = rank["head"][micro_batch]
        assert split["loss"] == pytest.approx(whole["loss"], abs=1e-12)
        assert split["dev"] == pytest.approx(whole["dev"], abs=1e-12)
        assert _furthest(whole["gradients"], split["gradients"]) < 1e-12


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 4), (2, 0), (2, 2), (3, 0), (3, 2)])
def test_nor_does_the_gradient_of_an_encoder_that_is_trained_too(worlds, world, micro_batch):
    whole = worlds[1][0]["encoder"][0]
    assert any(name.startswith("encoder.") for name in whole["gradients"])
    for rank in worlds[world]:
        split = rank["encoder"][micro_batch]
        assert split["loss"] == pytest.approx(whole["loss"], abs=1e-12)
        assert _furthest(whole["gradients"], split["gradients"]) < 1e-12


def test_a_rank_without_a_row_of_the_batch_takes_part(worlds):
    """Two utterances over three ranks."""
    whole = worlds[1][0]["few"]
    for rank in worlds[3]:
        assert rank["few"]["loss"] == pytest.approx(whole["loss"], abs=1e-12)
        assert _furthest(whole["gradients"], rank["few"]["gradients"]) < 1e-12


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_hold_the_same_weights_and_scores_bit_for_bit(worlds, world):
    first, *others = worlds[world]
    for kind in ("head", "encoder"):
        for micro_batch, one in first[kind].items():
            for other in (rank[kind][micro_batch] for rank in others):
                assert (one["loss"], one["dev"]) == (other["loss"], other["dev"])
                assert all(torch.equal(one["weights"][name], tensor) for name, tensor in other["weights"].items())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_encoder_thaws_on_every_rank_and_its_gradient_is_exchanged_from_then_on(worlds, world):
    whole = worlds[1][0]["thawed"]
    for rank in worlds[world]:
        start, first, second, third, _ = rank["thawed"]["levels"]
        assert torch.equal(start, first) and torch.equal(first, second) and not torch.equal(second, third)
        assert rank["thawed"]["losses"] == pytest.approx(whole["losses"], abs=1e-9)
        for one, other in zip(whole["levels"], rank["thawed"]["levels"], strict=True):
            torch.testing.assert_close(one, other, atol=1e-8, rtol=0)


@pytest.mark.parametrize("world", [2, 3])
def test_predictions_are_shared_out_and_are_the_same_on_every_rank(worlds, world):
    whole, first = worlds[1][0]["predicted"], worlds[world][0]["predicted"]
    torch.testing.assert_close(first, whole, atol=1e-12, rtol=0)
    assert all(torch.equal(first, rank["predicted"]) for rank in worlds[world])


@pytest.mark.parametrize("shares", SHARES)
def test_the_mean_over_two_ranks_of_their_own_ccc_has_another_gradient(worlds, shares):
    """By so much of the largest value of the gradient, where the exact one differs by 1e-15."""
    difference = _furthest(worlds[1][0]["mean of ranks"][shares], worlds[2][0]["mean of ranks"][shares])
    assert difference > SHARES[shares]
