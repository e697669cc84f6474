"""Running trials under Ray Tune, which places them on the cluster and stops the worse ones early.

Tune asks schedule.py for the next trial and passes it what trials report; it keeps no state that a sweep needs again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

from cpcscale.emotion.inputs import PreparedCorpus
from cpcscale.errors import Terminated, UserError
from cpcscale.experiments.sweep.config import SweepConfig
from cpcscale.experiments.sweep.journal import METRIC, TrialRecord
from cpcscale.experiments.sweep.resources import TrialResources
from cpcscale.experiments.sweep.schedule import TrialSchedule
from cpcscale.experiments.sweep.space import with_values
from cpcscale.experiments.sweep.trial import run_trial
from cpcscale.signals import ENDING, handlers_restored

# Tune prints to stdout at any verbosity, its loggers write a folder for each trial, and its SIGINT handler swallows
# interrupts.
_QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


def run_trials(schedule: TrialSchedule, prepared: Mapping[str, PreparedCorpus], resources: TrialResources) -> None:
    """Runs the trials that have not ended, until all are in the journal. `prepared` is by feature_key."""
    config, journal = schedule.config, schedule.journal
    ended = {record.number for record in journal.ended()}
    schedule.left.extend(number for number in range(config.trials) if number not in ended)
    if not schedule.left:
        return
    for name, value in _QUIET_TUNE.items():
        os.environ.setdefault(name, value)
    # Tune logs a traceback for each failed trial; the sweep prints one line.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    import ray
    from ray import tune

    features = {key: ray.put(each) for key, each in prepared.items()}
    trainable = tune.with_parameters(
        run_trial, config=with_values(config, {}), features=features, threads=resources.threads
    )
    request = _StopRequest()
    with tempfile.TemporaryDirectory(prefix="cpcscale-sweep-", ignore_cleanup_errors=True) as folder, request.taken():
        stopped: set[int] = set()
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
            tune_config=tune.TuneConfig(
                num_samples=-1,  # until the searcher says that none is left
                max_concurrent_trials=resources.trials,
                # A new process for each trial would import torch for longer than it trains.
                reuse_actors=True,
                search_alg=_searcher(schedule),
                scheduler=make_scheduler(config, journal.ended(), stopped),
                trial_name_creator=lambda each: f"trial-{each.trial_id}",
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                verbose=0,
                stop=_stopper(request),
                callbacks=[_callback(schedule, stopped)],
            ),
        )
        try:
            tuner.fit()
        except tune.TuneError as error:
            # An error in the driver itself, such as a store that cannot be written.
            if isinstance(cause := _root_cause(error), UserError):
                raise cause from None
            raise
    request.pass_on()
    if schedule.left or schedule.running:
        # Tune handles SIGUSR1 itself, whatever is set, and returns as if all trials had ended.
        raise Terminated


class _StopRequest:
    """Whether the sweep was asked to stop by Ctrl-C or a signal of ENDING.

    Tune frees the resources of its trials when a Stopper ends it, not when it is interrupted.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """In the block, the first of these is only remembered; a second one acts as usual."""
        with contextlib.ExitStack() as handlers:

            def remember(number: int, frame: FrameType | None) -> None:
                self.signal = number
                handlers.close()

            handlers.enter_context(handlers_restored(signal.SIGINT, *ENDING, meanwhile=remember))
            yield

    def pass_on(self) -> None:
        """Raises Terminated or KeyboardInterrupt if a stop was requested."""
        if self.signal is not None:
            raise Terminated if self.signal in ENDING else KeyboardInterrupt


def _stopper(request: _StopRequest) -> Any:
    from ray import tune

    class Stopper(tune.Stopper):
        """Ends all trials once a stop was requested."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return request.signal is not None

    return Stopper()


def make_scheduler(config: SweepConfig, ended: Sequence[TrialRecord], stopped: set[int]) -> Any:
    """ASHA (Li et al., MLSys 2020), which has seen the `ended` trials; for scheduler=none one that stops no trial.

    It adds the numbers of the trials that it stops before their last epoch to `stopped`.
    """
    from ray.tune import schedulers

    if config.scheduler == "none":
        return schedulers.FIFOScheduler()

    class Asha(schedulers.ASHAScheduler):
        """Records which trials it stopped, and knows trials by our number, which stays when one starts again."""

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(tune_controller, _by_number(trial))

        def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_remove(tune_controller, _by_number(trial))

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(tune_controller, _by_number(trial), result)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision: str = super().on_trial_result(tune_controller, _by_number(trial), result)
            if decision == self.STOP and result["epoch"] < config.fit.epochs:
                stopped.add(trial.config["number"])
            return decision

    asha = Asha(
        time_attr="epoch",
        metric=METRIC,
        mode="max",
        max_t=config.fit.epochs,
        grace_period=config.grace_epochs,
        reduction_factor=config.reduction_factor,
    )
    for record in ended:
        before = SimpleNamespace(config={"number": record.number})
        asha.on_trial_add(None, before)
        for report in record.reports:
            asha.on_trial_result(None, before, report)
    stopped.clear()
    return asha


def _by_number(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["number"])


def _searcher(schedule: TrialSchedule) -> Any:
    from ray.tune.search import Searcher

    class RemainingTrials(Searcher):
        """Gives Tune the trials that are left, each with its values."""

        def suggest(self, trial_id: str) -> Any:
            if not schedule.left:
                # A trial that runs now may have to start again.
                return None if schedule.running else Searcher.FINISHED
            record = schedule.start_next()
            return {"number": record.number, "values": record.values}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """Nothing to do: the journal has it."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing to do: the journal has it."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing to do: the journal has it."""

    return RemainingTrials()


def _callback(schedule: TrialSchedule, stopped: set[int]) -> Any:
    from ray import tune

    class Callback(tune.Callback):
        """Passes Tune's events to the schedule."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            schedule.tracked.start(schedule.journal.records[trial.config["number"]])

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            schedule.report(trial.config["number"], result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            number = trial.config["number"]
            schedule.end(number, "stopped" if number in stopped else "finished")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            schedule.process_died(trial.config["number"], _failure_reason(trial))

    return Callback()


def _root_cause(error: BaseException) -> BaseException:
    """The first error of a chain of errors."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _failure_reason(trial: Any) -> str:
    """What went wrong: the last line of the traceback, up to its first sentence."""
    path = Path(trial.error_file or "")
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []
    return lines[-1].strip().partition(". ")[0][:200] if lines else "no reason given"
