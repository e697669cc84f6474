"""What a run is asked while it goes on: one checkpoint just then, or one and to end; neither changes what it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import speech
import torch

from cpcscale.train.loop import pretrain
from cpcscale.train.observer import RunRequests, StoppedError, asks_to_stop
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe

LAST = 9
# No checkpoint is due but the one at the end.
RARE = {"checkpoint__every_steps": 100}


class Asking(speech.Watcher):
    """An observer that asks, once each of these steps is made."""

    def __init__(self, ask: Callable[[], None], *steps: int, stop_at: int = 0) -> None:
        super().__init__(stop_at)
        self._ask, self._steps = ask, steps

    def progress(self, step: int, total: int) -> None:
        if step in self._steps:
            self._ask()
        super().progress(step, total)


def short(folder: Path, **overrides: Any) -> Recipe:
    """Nine steps of 2 s windows, eleven an epoch; ids beside the run."""
    values = {"window__seconds": 2.08, "train__steps": LAST, "train__log_window_ids": folder.with_suffix(".jsonl")}
    return speech.recipe(**{**values, **RARE, **overrides})


def run(
    shards: Path, folder: Path, watcher: speech.Watcher, requests: RunRequests | None = None, **overrides: Any
) -> dict[str, Any]:
    """The summary of a run in `folder`."""
    ranks = Ranks.current(torch.device("cpu"))
    recipe = short(folder, **overrides)
    return pretrain(recipe, speech.data(shards, validate=True), str(folder), ranks, watcher, requests=requests)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict[int, float], dict]:
    """(summary, loss by step, ids by step) of a run that is asked nothing."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    watcher = speech.Watcher()
    summary = run(shards, folder, watcher)
    assert checkpoints.steps(folder) == [LAST]
    return summary, watcher.losses, speech.ids(folder.with_suffix(".jsonl"))


def same(summary: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether both say the same of what was learnt; rates are of each run's own time."""
    names = ("steps", "loss", "accuracy_mean", "audio_s", "bad_windows", "heldout", "unseen")
    return all(summary[name] == pytest.approx(expected[name], abs=1e-6) for name in names)


def stopped(shards: Path, folder: Path, at: int, **overrides: Any) -> tuple[int, Asking]:
    """The step after which a run that is asked once step `at` is made has stopped, and its observer."""
    requests = RunRequests()
    watcher = Asking(requests.stop, at)
    with pytest.raises(StoppedError) as raised:
        run(shards, folder, watcher, requests, **overrides)
    step = max(watcher.losses)
    assert str(raised.value) == f"stopped after step {step} of {LAST}, with a checkpoint of it"
    return step, watcher


def test_every_notice_has_a_number_of_its_own_and_says_whether_it_was_to_stop():
    requests = RunRequests()
    numbers = [requests.number]
    for ask in (requests.save, requests.save, requests.stop, requests.save):
        ask()
        numbers.append(requests.number)
    assert numbers[0] == 0
    assert len(set(numbers)) == len(numbers)
    assert [asks_to_stop(number) for number in numbers] == [False, False, False, True, True]
    requests.stop()
    assert requests.number == numbers[-1], "to stop is asked for once"


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_checkpoint_that_is_asked_for_is_one_of_the_next_step_and_changes_nothing(undisturbed, shards, tmp_path, at):
    requests = RunRequests()
    watcher = Asking(requests.save, at)
    summary = run(shards, tmp_path / "run", watcher, requests)
    assert checkpoints.steps(tmp_path / "run") == [at + 1, LAST]
    assert watcher.saves == 2
    assert [step for step, _ in checkpoints.whole(tmp_path / "run")] == [at + 1, LAST]
    assert same(summary, undisturbed[0])
    assert watcher.losses == pytest.approx(undisturbed[1], abs=1e-6)
    assert speech.ids(tmp_path / "run.jsonl") == undisturbed[2]


def test_two_notices_in_one_step_and_a_checkpoint_that_was_due_are_one_checkpoint(shards, tmp_path):
    requests = RunRequests()

    def twice() -> None:
        requests.save()
        requests.save()

    watcher = Asking(twice, 3)
    run(shards, tmp_path / "run", watcher, requests, checkpoint__every_steps=4, checkpoint__keep=LAST)
    assert checkpoints.steps(tmp_path / "run") == [4, 8, LAST]
    assert watcher.saves == 3


def test_a_notice_each_step_is_a_checkpoint_each_step(undisturbed, shards, tmp_path):
    requests = RunRequests()
    watcher = Asking(requests.save, *range(1, LAST))
    summary = run(shards, tmp_path / "run", watcher, requests, checkpoint__keep=LAST)
    assert checkpoints.steps(tmp_path / "run") == list(range(2, LAST + 1))
    assert same(summary, undisturbed[0])


def test_a_run_that_was_asked_before_its_first_step_stops_after_it(shards, tmp_path):
    requests = RunRequests()
    requests.stop()
    with pytest.raises(StoppedError, match=f"stopped after step 1 of {LAST}, with a checkpoint of it"):
        run(shards, tmp_path / "run", speech.Watcher(), requests)
    assert checkpoints.steps(tmp_path / "run") == [1]


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_run_asked_to_stop_does_so_behind_a_checkpoint_of_its_last_step_and_goes_on_as_undisturbed(
    undisturbed, shards, tmp_path, at
):
    summary, losses, ids = undisturbed
    folder = tmp_path / "run"
    step, first = stopped(shards, folder, at)
    assert step == at + 1
    assert checkpoints.steps(folder) == [step]
    assert first.saves == 1
    # The same command again, which nobody asks anything.
    second = speech.Watcher()
    resumed = run(shards, folder, second, RunRequests())
    assert list(second.losses) == list(range(step + 1, LAST + 1)), "no step is made twice"
    assert f"step {step} of {LAST}" in " ".join(second.notes)
    assert first.losses | second.losses == pytest.approx(losses, abs=1e-6)
    assert same(resumed, summary)
    assert speech.ids(tmp_path / "run.jsonl") == ids


@pytest.mark.parametrize("at", [LAST - 1, LAST])
def test_a_run_asked_to_stop_in_its_last_step_ends_as_any_other(undisturbed, shards, tmp_path, at):
    requests = RunRequests()
    watcher = Asking(requests.stop, at)
    assert same(run(shards, tmp_path / "run", watcher, requests), undisturbed[0])
    assert checkpoints.steps(tmp_path / "run") == [LAST]


def test_a_finished_run_that_is_asked_to_stop_states_its_summary(undisturbed, shards, tmp_path):
    run(shards, tmp_path / "run", speech.Watcher())
    requests = RunRequests()
    requests.stop()
    assert same(run(shards, tmp_path / "run", speech.Watcher(), requests), undisturbed[0])


def test_losses_that_were_not_logged_before_a_stop_are_made_up_for_by_a_run_that_ends_there(
    undisturbed, shards, tmp_path
):
    """A checkpoint carries the loss of its own step, also where its step was not one to be logged."""
    rare = {"train__log_every_steps": 100, "train__validate_every_steps": 100}
    requests = RunRequests()
    with pytest.raises(StoppedError):
        run(shards, tmp_path / "run", Asking(requests.stop, 4), requests, **rare)
    [step] = checkpoints.steps(tmp_path / "run")
    summary = run(shards, tmp_path / "run", speech.Watcher(), train__steps=step, **rare)
    assert summary["loss"] == pytest.approx(undisturbed[1][step], abs=1e-6)


def test_a_run_that_was_asked_something_hears_what_it_is_asked_after_it_was_killed_and_goes_on(shards, tmp_path):
    for at in (2, 5):
        requests = RunRequests()
        with pytest.raises(speech.Killed):
            run(shards, tmp_path / "run", Asking(requests.save, at, stop_at=at + 2), requests)
        assert checkpoints.steps(tmp_path / "run")[-1] == at + 1
