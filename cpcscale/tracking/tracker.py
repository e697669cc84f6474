"""Writes runs to MLflow: one MLflow run for one run folder, across restarts.

outbox.py ensures that a resumed run never logs a step twice; runs.py reads what is written here.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpcscale import storage
from cpcscale.config import check_choice, redact, redacted
from cpcscale.errors import UserError, optional
from cpcscale.tracking import run_note
from cpcscale.tracking.about import NOTE_TAG, About
from cpcscale.tracking.model_folder import TrackedModel
from cpcscale.tracking.outbox import Outbox, Record, StoreAwayError, always
from cpcscale.tracking.registry import is_local, log_model
from cpcscale.tracking.store import TrackingConfig, brief, connect, prepare, sqlite_path, store_errors, store_uri

logger = logging.getLogger(__name__)

PARENT_TAG, NAME_TAG = "mlflow.parentRunId", "cpcscale.name"
_NOTHING = About()
_STOPPED = "It was stopped before its end."
_VALUE_CHARACTERS = 6000  # MLflow's limit for a parameter; a tag may have 8000.
# Error codes that may pass, or that are about this client: with any other, the store refuses the record for good.
_MAY_PASS = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED"}
_MAY_PASS |= {"DEADLINE_EXCEEDED", "RESOURCE_CONFLICT", "PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND"}


class Tracker:
    """One MLflow run, open for writing. Only `start` raises when the store is away; records are kept and sent later."""

    def __init__(
        self,
        client: Any,
        run_id: str,
        run_dir: str | None,
        allowed: Callable[[], bool] = always,
        note: Sequence[str] = (),
    ) -> None:
        """Use `start`. `note`: the first lines of the run's note, to which the last says what came of it."""
        self.run_id, self._run_dir = run_id, run_dir
        self._note, self._outcome = note, ""
        self._sink = _MlflowSink(client, run_id)
        self._unsent_url = storage.join(run_dir, run_note.UNSENT) if run_dir else None
        self._outbox = Outbox(run_id, self._sink, self._unsent_url, allowed)
        self.unsent_end = self._outbox.unsent_end

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        *,
        kind: str,
        name: str,
        run_dir: str | None,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        parent: str | None = None,
        allowed: Callable[[], bool] = always,
        about: About = _NOTHING,
    ) -> Tracker:
        """Opens the run named in `run_dir/run.json` if the store still has it, else creates one and names it there.

        A copied folder gets a new run that names its origin. Raises UserError if the folder's run is of another kind.

        `name` is what cpcscale calls the run, `about` what MLflow's pages show of it. Tags are overwritten. Params keep
        their first value; those that have changed are listed in the tag `cpcscale.changed`. Raises StoreError when the
        store cannot be used. Nothing is sent or kept while `allowed()` is false.
        """
        known_id, copied = run_note.read_own(run_dir, kind) if run_dir else (None, {})
        client, experiment_id = prepare(config)
        with store_errors(config):
            # Created with its kind, so that a run whose driver is killed right now is still listed.
            first = {"cpcscale.kind": kind, NAME_TAG: name} | ({PARENT_TAG: parent} if parent else {})
            title, note = about.shown_title(name, run_dir), about.note(run_dir)
            run = _active_run(client, known_id) or client.create_run(experiment_id, run_name=title, tags=first)
            try:
                told = {NOTE_TAG: _as_note(note, "It runs.")} if note else {}
                _describe(client, run, {**tags, **copied, **told, "cpcscale.kind": kind, NAME_TAG: name}, params)
                if about.data:
                    client.log_inputs(run.info.run_id, [each.as_input() for each in about.data])
                if run_dir:
                    run_note.write(run_dir, run.info.run_id, kind, name, config.experiment)
            except BaseException:
                client.set_terminated(run.info.run_id, "FAILED")
                raise
        return cls(client, run.info.run_id, run_dir, allowed, note)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues the values of one step, to be sent within about 2 s. Keys that already have this step are skipped."""
        now_ms = int(time.time() * 1000)
        self._outbox.put([(key, float(value), now_ms, int(step)) for key, value in metrics.items()])

    def tag(self, name: str, value: str) -> None:
        """Queues the tag `cpcscale.NAME`; a later value of the same tag replaces it."""
        self._outbox.put_tag(f"cpcscale.{name}", _shown(name, value))

    def artifact(self, name: str, data: str | bytes) -> None:
        """Queues one file (`name` may be a path below the run's artifacts); replaces a file of the same name."""
        self._outbox.put_file(name, data.encode() if isinstance(data, str) else data)

    def model(self, model: TrackedModel) -> None:
        """Queues a recogniser or encoder, to be logged as a model of this run. Its folder has to stay until it is sent.

        One with training data in it is logged only where MLflow keeps its files on this machine.
        """
        self._outbox.put_file(f"models/{model.name}", model)

    def outcome(self, text: str) -> None:
        """What came of the run, in a line: the last of its note. Without it, that line says how the run ended."""
        self._outcome = redact(text)

    def flush(self) -> bool:
        """Sends all records. Returns False if that fails; they are then in `run_dir/unsent.json` for the next start.

        Called when a checkpoint is published, so that the records up to that step survive the process.
        """
        return self._outbox.flush()

    def finish(self, status: str, summary: Mapping[str, float] | None = None) -> None:
        """Sends the rest and closes the run as FINISHED, FAILED or KILLED; waits at most about 20 s for the store.

        Summary values are logged at the run's last step, or one step later if the key has another value there.
        """
        check_choice("status", status, ("FINISHED", "FAILED", "KILLED"))
        values = {key: float(value) for key, value in (summary or {}).items()}
        if self._note:
            figures = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
            ended = {"FINISHED": f"It finished: {figures}" if figures else "It finished.", "FAILED": "It failed."}
            self._outbox.put_tag(NOTE_TAG, _as_note(self._note, self._outcome or ended.get(status, _STOPPED)))
        sent = self._outbox.close(status, values)
        if self._run_dir:
            with optional(f"{self._run_dir} does not say that its run ended", "the next start ends it again"):
                run_note.end(self._run_dir, self.run_id)
        if not sent:
            kept = f"kept in {self._unsent_url} for the next start" if self._unsent_url else "lost (it has no run_dir)"
            logger.warning("the tracking store is still away: the last records of run %s are %s", self.run_id, kept)


def add_values(
    config: TrackingConfig, run_dir: str, kind: str, by_step: Mapping[int, Mapping[str, float]]
) -> int | None:
    """Adds values to the MLflow run of a folder, which may be under way or over: its status and driver stay.

    What a key has at a step stays too. Returns how many values were added; None if the store has no run of the folder.
    Raises UserError when the folder holds a run of another kind, StoreError when the store does not answer.
    """
    run_id, _ = run_note.read_own(run_dir, kind)
    path = sqlite_path(store_uri(config))
    # Connecting would create the file.
    if run_id is None or (path and not path.exists()):
        return None
    with store_errors(config):
        from mlflow.entities import Metric

        client, now_ms, added = connect(config), int(time.time() * 1000), 0
        if _found(client, run_id) is None:
            return None
        keys = {key for values in by_step.values() for key in values}
        known = {(key, point.step) for key in keys for point in client.get_metric_history(run_id, key)}
        for step, values in by_step.items():
            fresh = [Metric(key, value, now_ms, step) for key, value in values.items() if (key, step) not in known]
            if fresh:
                client.log_batch(run_id, metrics=fresh)
            added += len(fresh)
    return added


def settle(config: TrackingConfig, run_dir: str, kind: str) -> None:
    """For the start of a run of this kind in the folder: ends the folder's earlier run if its driver died unawares.

    Sends what that driver kept, and ends its run as it did, else as KILLED, with the trials and folds below it. Drivers
    on other machines are left alone, for they may live. A store that does not answer is one warning. Raises UserError
    when the folder holds a run of another kind.
    """
    note = run_note.read(run_dir)
    run_note.refuse_other_kind(run_dir, kind, note)
    if not run_note.is_abandoned(run_dir, note):
        return
    what = f"the earlier run of {storage.shown(run_dir)} could not be ended in the tracking store"
    with optional(what, "trying again at the next start"), store_errors(config):
        client = connect(config)
        run = client.get_run(note["run_id"])
        if run.info.status == "RUNNING":
            _kill_below(client, run.info)
            _note_stop(client, run)
        tracker = Tracker(client, note["run_id"], run_dir)
        tracker.finish(*tracker.unsent_end or ("KILLED" if run.info.status == "RUNNING" else run.info.status, {}))


def _kill_below(client: Any, info: Any) -> None:
    below = f"tags.`{PARENT_TAG}` = '{info.run_id}' and attributes.status = 'RUNNING'"
    for run in client.search_runs([info.experiment_id], below):
        _kill_below(client, run.info)
        _note_stop(client, run)
        client.set_terminated(run.info.run_id, "KILLED")


def _note_stop(client: Any, run: Any) -> None:
    if lines := run.data.tags.get(NOTE_TAG, "").splitlines():
        client.set_tag(run.info.run_id, NOTE_TAG, _as_note(lines[:-1], _STOPPED))


class _MlflowSink:
    """Stores the records of one run; a record that the store refuses for good is dropped with a warning."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._refused: set[str] = set()

    def last_values(self) -> dict[str, tuple[int, float]]:
        with self._errors("the last values"):
            return last_values_of(self._client.get_run(self._run_id))
        return {}

    def send_values(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        with self._errors(f"{len(records)} metric values"):
            metrics = [Metric(key, value, at_ms, step) for key, value, at_ms, step in records]
            self._client.log_batch(self._run_id, metrics=metrics)

    def send_tag(self, key: str, value: str) -> None:
        with self._errors(f"the tag {key}"):
            self._client.set_tag(self._run_id, key, value)

    def send_artifact(self, name: str, data: bytes) -> None:
        import tempfile

        folder, _, file_name = name.rpartition("/")
        try:
            with tempfile.TemporaryDirectory() as place:
                Path(place, file_name).write_bytes(data)
                self._client.log_artifact(self._run_id, str(Path(place, file_name)), folder or None)
        except Exception as error:  # noqa: BLE001 (each library of a place for files raises errors of its own)
            raise StoreAwayError(brief(error)) from None

    def send_model(self, model: TrackedModel) -> None:
        try:
            info = self._client.get_run(self._run_id).info
            holds = [f"holds {model.training_rows} rows of training data"] * bool(model.training_rows)
            if model.limits:
                holds.append(f"is marked {' and '.join(model.limits)}")
            if holds and not is_local(info.artifact_uri):
                logger.warning(
                    "%s %s, and %s is not on this machine: it is not logged; `cpcscale register %s --name NAME` says "
                    "how it can be",
                    *(model.url, " and ".join(holds), redact(info.artifact_uri), model.url),
                )
                return
            log_model(self._client, info.experiment_id, self._run_id, model)
        except UserError as error:
            logger.warning("the %s %s is not logged to run %s: %s", model.kind, model.url, self._run_id, error)
        except Exception as error:  # noqa: BLE001 (each library of a place for files raises errors of its own)
            raise StoreAwayError(brief(error)) from None

    def end(self, status: str, summary: dict[str, float]) -> None:
        last = self.last_values()  # A worker process may have logged to this run meanwhile.
        top, now_ms = max((step for step, _ in last.values()), default=0), int(time.time() * 1000)
        records: list[Record] = []
        for key, value in summary.items():
            step, known = last.get(key, (-1, None))
            if known is None or not (known == value or (math.isnan(known) and math.isnan(value))):
                records.append((key, value, now_ms, max(top, step + 1)))
        self.send_values(records)
        with self._errors("the final status"):
            self._client.set_terminated(self._run_id, status)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turns the errors of the store into StoreAwayError; a record that it refuses for good is dropped.

        Each cause of a refusal is one warning, for a run that was deleted refuses all that comes.
        """
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            why = brief(error)
            if getattr(error, "error_code", "INTERNAL_ERROR") in _MAY_PASS:
                raise StoreAwayError(why) from None
            if why not in self._refused:
                self._refused.add(why)
                logger.warning(
                    "the tracking store refuses %s of run %s (%s): what it refuses so is left out from now on",
                    *(what, self._run_id, why),
                )


def _active_run(client: Any, run_id: str | None) -> Any | None:
    """The run, set to RUNNING again, or None when the store no longer has it."""
    run = _found(client, run_id) if run_id else None
    if run:
        client.update_run(run_id, status="RUNNING")
    return run


def _found(client: Any, run_id: str) -> Any | None:
    """The run, or None when the store no longer has it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _describe(client: Any, run: Any, tags: Mapping[str, str], params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param, RunTag

    wanted = {key: _shown(key, value) for key, value in params.items()}
    changed = sorted(key for key, value in run.data.params.items() if wanted.get(key, value) != value)
    if changed:
        tags = {**tags, "cpcscale.changed": ", ".join(changed)}
    client.log_batch(
        run.info.run_id,
        params=[Param(key, value) for key, value in wanted.items() if key not in run.data.params],
        tags=[RunTag(key, _shown(key, value)) for key, value in tags.items()],
    )


def _as_note(lines: Sequence[str], last: str) -> str:
    """The lines as MLflow shows them, one below the other."""
    return "  \n".join(line.strip() for line in (*lines, last))


def _shown(key: str, value: Any) -> str:
    """A value as it is stored: secrets replaced, cut to the length that MLflow takes."""
    return redact(str(redacted(key, value)))[:_VALUE_CHARACTERS]


def read_artifact(client: Any, run_id: str, name: str) -> bytes | None:
    """The bytes of one of a run's artifacts, or None when there is no such file."""
    import tempfile

    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(MlflowException, OSError):
        return Path(client.download_artifacts(run_id, name, folder)).read_bytes()
    return None


def last_values_of(run: Any) -> dict[str, tuple[int, float]]:
    """Step and value of the newest record of each metric of an MLflow run."""
    # Through the message form, because `data.metrics` leaves the steps out.
    return {metric.key: (metric.step, decode_value(metric.value)) for metric in run.data.to_proto().metrics}


def decode_value(stored: float) -> float:
    """The value that was logged: MLflow stores an infinity as the largest float of its sign."""
    return math.copysign(math.inf, stored) if abs(stored) >= sys.float_info.max else stored
