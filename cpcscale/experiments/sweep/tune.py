"""Running trials under Ray Tune: it places them, starts again those whose process died, and stops the worse ones early.

It is told of the trials that are left by sweep_trials.py, which also learns from it what becomes of them; Tune keeps
nothing that the sweep would need again.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Mapping, Sequence
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

# Tune's own output goes to stdout whatever its verbosity, its loggers write a folder a trial, and its handler of
# interrupts swallows them.
_QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


def run_trials(trials: TrialSchedule, prepared: Mapping[str, PreparedCorpus], share: TrialResources) -> None:
    """Runs the trials that are not over; the journal then has them all. `prepared` is by feature_key."""
    config, journal = trials.config, trials.journal
    over = {record.number for record in journal.over()}
    trials.left.extend(number for number in range(config.trials) if number not in over)
    if not trials.left:
        return
    for name, value in _QUIET_TUNE.items():
        os.environ.setdefault(name, value)
    # A trial that failed is said in one line.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    import ray
    from ray import tune

    features = {key: ray.put(each) for key, each in prepared.items()}
    trainable = tune.with_parameters(
        run_trial, config=with_values(config, {}), features=features, threads=share.threads
    )
    asked = _Asked()
    with tempfile.TemporaryDirectory(prefix="cpcscale-sweep-", ignore_cleanup_errors=True) as folder, asked:
        stopped: set[int] = set()
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": share.cpus, "gpu": share.gpus}),
            tune_config=tune.TuneConfig(
                num_samples=-1,  # until there is none left
                max_concurrent_trials=share.trials,
                # A process of its own for each trial would import torch for longer than it trains.
                reuse_actors=True,
                search_alg=_searcher(trials),
                scheduler=make_scheduler(config, journal.over(), stopped),
                trial_name_creator=lambda each: f"trial-{each.trial_id}",
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                verbose=0,
                stop=_stopper(asked),
                callbacks=[_callback(trials, stopped)],
            ),
        )
        try:
            tuner.fit()
        except tune.TuneError as error:
            # What went wrong in the driver itself, such as a store that cannot be written.
            if isinstance(cause := _first(error), UserError):
                raise cause from None
            raise
    asked.pass_on()


class _Asked:
    """Inside, the first Ctrl-C or SIGTERM is remembered; the next one does what it did before.

    Tune frees what its trials hold when it is asked to end, not when it is interrupted.
    """

    def __init__(self) -> None:
        self.by: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._ask) for each in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on(self) -> None:
        """Raises what was asked for, if anything was."""
        if self.by is not None:
            raise Terminated if self.by == signal.SIGTERM else KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.by = number
        self.__exit__()


def _stopper(asked: _Asked) -> Any:
    from ray import tune

    class Stopper(tune.Stopper):
        """Ends all trials once that was asked for."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return asked.by is not None

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return Stopper()


def make_scheduler(config: SweepConfig, over: Sequence[TrialRecord], stopped: set[int]) -> Any:
    """ASHA (Li et al., MLSys 2020) that has seen the trials that are over, or one that lets all end.

    The numbers of trials that it stops before their last epoch are put into `stopped`.
    """
    from ray.tune import schedulers

    if config.scheduler == "none":
        return schedulers.FIFOScheduler()

    class Asha(schedulers.ASHAScheduler):
        """Says which trials it stopped, and knows one that starts again by its number."""

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(tune_controller, _numbered(trial))

        def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_remove(tune_controller, _numbered(trial))

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(tune_controller, _numbered(trial), result)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision: str = super().on_trial_result(tune_controller, _numbered(trial), result)
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
    for record in over:
        before = SimpleNamespace(config={"number": record.number})
        asha.on_trial_add(None, before)
        for report in record.reports:
            asha.on_trial_result(None, before, report)
    stopped.clear()
    return asha


def _numbered(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["number"])


def _searcher(ours: TrialSchedule) -> Any:
    from ray.tune.search import Searcher

    class Numbers(Searcher):
        """Hands out the trials that are left, each with its values."""

        def suggest(self, trial_id: str) -> Any:
            if not ours.left:
                # One that is under way may have to start again.
                return None if ours.under_way else Searcher.FINISHED
            record = ours.begin()
            return {"number": record.number, "values": record.values}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """The journal has it."""

        def save(self, checkpoint_path: str) -> None:
            """The journal has it."""

        def restore(self, checkpoint_path: str) -> None:
            """The journal has it."""

    return Numbers()


def _callback(ours: TrialSchedule, stopped: set[int]) -> Any:
    from ray import tune

    class Callback(tune.Callback):
        """Tune's events, handed on."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ours.children.start(ours.journal.records[trial.config["number"]])

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            ours.report(trial.config["number"], result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            number = trial.config["number"]
            ours.end(number, "stopped" if number in stopped else "finished")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ours.died(trial.config["number"], _why(trial))

    return Callback()


def _first(error: BaseException) -> BaseException:
    """The error that others were raised from, or in the handling of."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _why(trial: Any) -> str:
    """What went wrong in a few words: the error's own last line, or the first sentence on how a process died."""
    path = Path(trial.error_file or "")
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []
    return lines[-1].strip().partition(". ")[0][:200] if lines else "without a word"
