"""Recognisers and encoders in MLflow: logged to a run, registered under a name, and found by it, as released ones."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpcscale import released, storage
from cpcscale.config import redact
from cpcscale.errors import UserError
from cpcscale.tracking.about import DIGEST_CHARACTERS
from cpcscale.tracking.model_folder import TrackedModel, write_model_folder
from cpcscale.tracking.store import TrackingConfig, connect, prepare, sqlite_path, store_errors, store_uri

log = logging.getLogger(__name__)

_SCHEME = "models:/"
# NAME@ALIAS, NAME/VERSION, or the id of a model that was logged and has no name.
_ADDRESS = re.compile(r"(?P<id>m-[0-9a-f]{32})|(?P<name>[^/@:]+)(@(?P<alias>[^/@:]+)|/(?P<version>\d+))")
_NAME = re.compile(r"[A-Za-z][\w.-]*")
# Aliases that MLflow refuses, and only after the version is there.
_RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)
_VERSIONS_TAG = "mlflow.modelVersions"
DIGEST, KIND, TRAINING_ROWS = "cpcscale.digest", "cpcscale.kind", "cpcscale.training_rows"
_SCORE = "cpcscale.ccc_mean"
# Two scores are of the same thing if these are equal.
_COMPARED = ("corpus_hash", "protocol", "scale", "marks")


def log_model(client: Any, experiment_id: str, run_id: str | None, model: TrackedModel) -> str:
    """Stores the model as a logged model of the run, and returns its id. Once is enough: a second call finds it.

    Raises UserError when the saved folder is another one by now, and what MLflow raises.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    found = _logged(client, experiment_id, model.digest)
    known = [each for each in found if (each.source_run_id, each.name) == (run_id, model.name)]
    if known and str(known[0].status) == "READY":
        return str(known[0].model_id)
    # One that is not ready was left by a process that ended meanwhile.
    made = known[0] if known else _create(client, experiment_id, run_id, model)
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(Path(folder), model, run_id=run_id, model_id=made.model_id)
        client.log_model_artifacts(made.model_id, folder)
    if run_id is not None:
        run, now_ms = client.get_run(run_id), int(time.time() * 1000)
        if made.model_id not in [each.model_id for each in run.outputs.model_outputs]:
            client.log_outputs(run_id, [LoggedModelOutput(made.model_id, 0)])
        name, digest = model.corpus
        of = {"model_id": made.model_id, "run_id": run_id}
        of |= {"dataset_name": name, "dataset_digest": digest[:DIGEST_CHARACTERS]}
        client.log_batch(run_id, [Metric(key, value, now_ms, 0, **of) for key, value in model.scores.items()])
    client.finalize_logged_model(made.model_id, "READY")
    return str(made.model_id)


def _create(client: Any, experiment_id: str, run_id: str | None, model: TrackedModel) -> Any:
    return client.create_logged_model(experiment_id, model.name, run_id, _tags(model), model_type=model.kind)


def _tags(model: TrackedModel) -> dict[str, str]:
    return model.tags | {DIGEST: model.digest, KIND: model.kind, TRAINING_ROWS: str(model.training_rows)}


def _logged(client: Any, experiment_id: str, digest: str) -> list[Any]:
    """The logged models of this content, the oldest first."""
    found = client.search_logged_models([experiment_id], f"tags.`{DIGEST}` = '{digest}'")
    return sorted(found, key=lambda each: each.creation_timestamp)


def register(
    config: TrackingConfig, model: TrackedModel, name: str, alias: str, *, force: bool = False
) -> dict[str, Any]:
    """Makes the model a version of the registered model `name`, and points `alias` (empty: none) at it.

    Returns {name, version, alias, before}, `before` the version that had the alias. Where the model is a
    version already it stays that one. Without `force` an alias does not move to a model with a lower mean CCC, nor to
    one whose CCC is of another corpus, protocol, scale or of other marks, nor to another encoder, which has no CCC.
    Raises UserError then, before it writes.
    """
    if not _NAME.fullmatch(name) or (alias and not _NAME.fullmatch(alias)):
        raise UserError(f"{name}@{alias} is no name: begin with a letter and go on with letters, digits, _, - or .")
    if _RESERVED.fullmatch(alias):
        raise UserError(f"MLflow keeps the alias {alias} to itself: choose another one, such as champion")
    client, experiment_id = prepare(config)
    with store_errors(config):
        holder = _with_alias(client, name, alias) if alias else None
        known = _version(client, name, model)
        if holder is not None and not force and (known is None or holder.version != known.version):
            _refuse_worse(model, holder, f"{name}@{alias}")
        if known is None:
            known = _add_version(config, client, experiment_id, model, name)
        if alias:
            client.set_registered_model_alias(name, alias, known.version)
    before = holder.version if holder is not None else None
    return {"name": name, "version": str(known.version), "alias": alias, "before": before}


def _add_version(config: TrackingConfig, client: Any, experiment_id: str, model: TrackedModel, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    ready = [each for each in _logged(client, experiment_id, model.digest) if str(each.status) == "READY"]
    logged = ready[0] if ready else client.get_logged_model(log_model(client, experiment_id, None, model))
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A server wants the model's id, and keeps that it has this version. A database would look the id up in MLflow's
    # default store, which may be another one.
    served = store_uri(config).startswith(("http", "databricks"))
    made = client.create_model_version(
        name, logged.artifact_location, logged.source_run_id, _tags(model), model_id=logged.model_id if served else None
    )
    if not served:
        versions = [*json.loads(logged.tags.get(_VERSIONS_TAG, "[]")), {"name": name, "version": made.version}]
        client.set_logged_model_tags(logged.model_id, {_VERSIONS_TAG: json.dumps(versions)})
    return made


def _version(client: Any, name: str, model: TrackedModel) -> Any | None:
    found = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST}` = '{model.digest}'")
    return next(iter(found), None)


def _with_alias(client: Any, name: str, alias: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # The alias is not set, or there is no model of this name.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _refuse_worse(model: TrackedModel, holder: Any, address: str) -> None:
    there = f"{address} is version {holder.version}"
    other = [key for key in _COMPARED if holder.tags.get(f"cpcscale.{key}") != model.tags.get(f"cpcscale.{key}")]
    if other:
        raise UserError(
            f"{there}, and its score cannot be compared with that of {model.url}: they differ in "
            f"{', '.join(other).replace('_hash', '')}; use --force to move the alias anyway"
        )
    if _SCORE not in model.tags:
        raise UserError(
            f"{there}, another encoder, and which one is better only recognisers on them can say: use --force to move "
            "the alias"
        )
    score, known = (float(tags[_SCORE]) for tags in (model.tags, holder.tags))
    if not score >= known:
        raise UserError(
            f"{there}, with a mean CCC of {known:.3f}; {model.url} has {score:.3f}: use --force to move the alias to it"
        )


@contextlib.contextmanager
def opened(model: str) -> Iterator[str]:
    """The folder of the recogniser or encoder that `model` names, for as long as the block lasts.

    `models:/NAME@ALIAS`, `models:/NAME/VERSION` and `models:/ID` are looked up in MLflow, in the store of
    MLFLOW_TRACKING_URI; the bare name of a released recogniser is that one, and `./NAME` a folder of this name.
    Anything else is a folder itself. Raises UserError for a name that is not registered, or is nearly a released one.
    """
    if place := released.folder(model):
        if storage.exists(f"./{model}"):
            log.warning("%s is the released recogniser: write ./%s for the folder of that name here", model, model)
        yield place
        return
    if not model.startswith(_SCHEME):
        yield model
        return
    config = TrackingConfig()
    with contextlib.ExitStack() as stack:
        with store_errors(config):
            place = _location(config, model)
            if not is_local(place):
                from mlflow.artifacts import download_artifacts

                folder = stack.enter_context(tempfile.TemporaryDirectory())
                place = download_artifacts(place, dst_path=folder, tracking_uri=store_uri(config))
        yield place


def is_name(model: str) -> bool:
    """Whether `opened` looks this up, and it is no place. Raises UserError for what is nearly a released name."""
    return model.startswith(_SCHEME) or bool(released.folder(model))


def is_local(place: str) -> bool:
    """Whether MLflow keeps files of this place on this machine."""
    return place.startswith(("/", "file:"))


def _location(config: TrackingConfig, model: str) -> str:
    """Where MLflow keeps the saved folder of the model."""
    from mlflow.exceptions import MlflowException

    address = _ADDRESS.fullmatch(model.removeprefix(_SCHEME))
    if address is None and _NAME.fullmatch(model.removeprefix(_SCHEME)):
        raise UserError(f"{model} names no version: write {model}@ALIAS, such as {model}@champion, or {model}/1")
    if address is None:
        raise UserError(f"{model} is no address of a model: write {_SCHEME}NAME@ALIAS or {_SCHEME}NAME/VERSION")
    missing = UserError(
        f"{redact(store_uri(config))} has no model {model}: run `cpcscale register`, or name its store by "
        "MLFLOW_TRACKING_URI"
    )
    # Connecting would create the file.
    if (path := sqlite_path(store_uri(config))) and not path.exists():
        raise missing
    client, name, version = connect(config), address["name"], address["version"]
    try:
        if not name:
            found = client.get_logged_model(address["id"])
        elif version:
            found = client.get_model_version(name, version)
        else:
            found = client.get_model_version_by_alias(name, address["alias"])
        if DIGEST not in found.tags:
            raise UserError(f"{model} is no model that cpcscale logged or registered")
        files = client.get_model_version_download_uri(name, found.version) if name else found.artifact_location
        return f"{files}/{found.tags.get(KIND, 'recogniser')}"
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise missing from None
        raise
