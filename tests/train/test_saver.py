"""Saving beside the loop: what is published is the moment of the save, and what went wrong is said."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest
import torch

from cpcscale.errors import UserError
from cpcscale.runs.ledger import Ledger
from cpcscale.runs.publisher import Publisher
from cpcscale.train.checkpoint import collect_tensors
from cpcscale.train.saver import HostCopies, Saver

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a saver's thread waits for before anything else, once it is told so; open at the end."""
    event = threading.Event()
    yield event
    event.set()


def saver(folder: Path) -> Saver:
    ledger = Ledger(str(folder))
    return Saver(Publisher(ledger, ledger.head(), 0, keep=9), checkpoints.RECIPE)


def test_what_is_published_is_the_moment_of_the_save_whatever_the_loop_does_meanwhile(tmp_path, gate):
    step, where, saving = (
        checkpoints.trained(2),
        checkpoints.position(2, bad_windows=[{"utterance": 1}]),
        saver(tmp_path),
    )
    then = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    moments = {
        (number, key): value.clone()
        for number, entry in step.optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    saving._thread.submit(gate.wait)
    saving.save(collect_tensors(step.contrast, step.optimizer), where)
    for t in range(2, 4):
        step(checkpoints.batches.made(seed=t), t)
    where.step, where.audio_s = 4, 9.0
    where.bad_windows.append({"utterance": 2})
    where.metrics["loss"] = 1.0
    assert not saving.published()
    assert checkpoints.newest(tmp_path) is None
    gate.set()
    assert saving.wait() is None
    restored = checkpoints.newest(tmp_path)
    assert restored.position == checkpoints.position(2, bad_windows=[{"utterance": 1}])
    for name, tensor in then.items():
        assert torch.equal(restored.tensors["model"][name], tensor), name
    for (number, key), value in moments.items():
        assert torch.equal(restored.tensors["optimizer"][f"{number}.{key}"], value), (number, key)


def test_a_checkpoint_is_told_once_and_only_when_it_is_published(tmp_path, gate):
    step, saving = checkpoints.trained(0), saver(tmp_path)
    for number in (2, 4):
        gate.clear()
        saving._thread.submit(gate.wait)
        saving.save(collect_tensors(step.contrast, step.optimizer), checkpoints.position(number))
        assert not saving.published()
        gate.set()
        assert saving.wait() is None
        assert saving.published()
        assert saving.url == checkpoints.newest(tmp_path).url
        assert not saving.published()
    saving.close()


def test_what_goes_wrong_in_a_save_is_said_to_the_loop_and_nothing_is_published(tmp_path, caplog):
    step, saving = checkpoints.trained(0), saver(tmp_path)
    for number in (2, 4):
        (tmp_path / "checkpoints" / f"step-{number:08d}-0001" / "state.json").mkdir(parents=True)
    saving.save(collect_tensors(step.contrast, step.optimizer), checkpoints.position(2))
    error = saving.wait()
    assert isinstance(error, UserError)
    assert "step-00000002-0001/state.json cannot be" in str(error)
    assert not saving.published()
    # At the end nobody asks any more: it is a warning.
    saving.save(collect_tensors(step.contrast, step.optimizer), checkpoints.position(4))
    with caplog.at_level(logging.WARNING):
        saving.close()
    assert "the last checkpoint was not published" in caplog.text
    assert checkpoints.steps(tmp_path) == []


def test_a_fault_of_ours_in_a_save_is_raised_as_it_is(tmp_path):
    step, saving = checkpoints.trained(0), saver(tmp_path)
    shared = collect_tensors(step.contrast, step.optimizer) | {"ema": {"1": torch.zeros(2, dtype=torch.complex32)}}
    saving.save(shared, checkpoints.position(2))
    with pytest.raises((ValueError, KeyError)):
        saving.wait()


def test_the_end_waits_for_the_save_under_way(tmp_path, gate):
    step, saving = checkpoints.trained(0), saver(tmp_path)
    saving._thread.submit(gate.wait)
    saving.save(collect_tensors(step.contrast, step.optimizer), checkpoints.position(2))
    threading.Timer(0.2, gate.set).start()
    saving.close()
    assert checkpoints.steps(tmp_path) == [2]
    assert saving.published()


@pytest.mark.parametrize("device", DEVICES)
def test_a_snapshot_reuses_its_buffers_and_follows_a_change_of_shape(device):
    snapshot = HostCopies()
    big = torch.arange(1 << 20, device=device, dtype=torch.float32)
    first = snapshot.take({"model": {"a": big, "t": torch.ones(3, 2, device=device).t()}})
    # In place, as an update does it: on a GPU it is in the queue behind the copy.
    big += 1
    snapshot.wait()
    assert torch.equal(first["model"]["a"], torch.arange(1 << 20, dtype=torch.float32))
    assert first["model"]["t"].is_contiguous()
    second = snapshot.take({"model": {"a": big}})
    snapshot.wait()
    assert second["model"]["a"].data_ptr() == first["model"]["a"].data_ptr()
    assert torch.equal(second["model"]["a"], big.cpu())
    third = snapshot.take({"model": {"a": big[:5].double()}})
    snapshot.wait()
    assert torch.equal(third["model"]["a"], torch.arange(1.0, 6.0, dtype=torch.float64))
