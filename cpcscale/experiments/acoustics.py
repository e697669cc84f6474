"""`cpcscale checkpoint acoustics`: what each checkpoint of a run keeps of speech, without labels, beside its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.emotion.acoustics import LAYERS, draw_speech, measure_network
from cpcscale.errors import UserError, optional
from cpcscale.progress import note
from cpcscale.runs import checkpoint_files, inspect
from cpcscale.shards.index import MARKER, Index
from cpcscale.shards.pack import HELDOUT, TRAIN
from cpcscale.tracking.store import TrackingConfig
from cpcscale.tracking.tracker import add_values
from cpcscale.train.checkpoint import load_encoder


@dataclass(kw_only=True)
class AcousticsConfig:
    """The speech on which checkpoints are measured."""

    # A shard set, or the folder of packed sets; empty: that of the run. Of packed sets, heldout is used if it has
    # enough utterances, else train.
    shards: str = ""
    # Utterances, about ten of each speaker.
    utterances: int = 400
    # Of longer ones, a part of this length.
    seconds: float = 10.0
    # The address of the MLflow store, by tracking.uri; empty: the run's own.
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        configs.at_least(20, utterances=self.utterances)
        configs.at_least(1, seconds=self.seconds)


def acoustics(path: str, spec: AcousticsConfig) -> dict[str, Any]:
    """Measures the whole checkpoints of a run, or the one at `path`, and an untrained network of the same kind.

    Returns {path, shards, fingerprint, utterances, groups, speakers, chance, random, checkpoints, added}; `random` and
    each of `checkpoints` hold {layer: {measure: figure}}. Steps that the run's MLflow run does not have yet are `added`
    to it, the untrained network as step 0; it is None where there is no such run, or, with a warning, no store. Raises
    UserError when there is no checkpoint, or no speech.
    """
    run_dir, places = inspect.whole_checkpoints(path)
    state = checkpoint_files.read_state(places[0])
    of_run = state.get("config") or {}
    index = _index(path, spec, of_run)
    note(f"acoustics: measuring speech of {storage.shown(index.base)}")
    speech = draw_speech(index, spec.utterances, spec.seconds)
    random, rows = None, []
    for place in places:
        try:
            network, facts = load_encoder(place)
        except UserError as error:
            # The run goes on, and may have removed it meanwhile.
            if not isinstance(error, checkpoint_files.TornError) and storage.exists(
                storage.join(place, checkpoint_files.MARKER)
            ):
                raise
            note(f"acoustics: left out: {error}")
            continue
        note(f"acoustics: measuring step {facts['step']:,}")
        rows.append({"step": facts["step"], "checkpoint": place, **measure_network(speech, network)})
        random = random or measure_network(speech, network.untrained(facts["identity"].get("seed", 0)))
    if random is None:
        raise UserError(f"no checkpoint at {path} could be read: see `cpcscale checkpoint verify {path}`")
    by_step = {row["step"]: _named(row) for row in rows}
    if not state["position"]["identity"].get("init_from"):
        # What the run began with.
        by_step[0] = _named(random)
    added = None
    with optional("the figures are not in MLflow", "they are only printed"):
        tracking = replace(spec.tracking, uri=spec.tracking.uri or of_run.get("tracking", {}).get("uri", ""))
        added = add_values(tracking, run_dir, "pretrain", by_step)
    return {
        "path": path,
        "shards": index.base,
        "fingerprint": index.fingerprint,
        "utterances": len(speech.waves),
        "groups": len(set(speech.group_U)),
        "speakers": sum(part.speakers for part in speech.judged),
        "chance": speech.chance,
        "random": random,
        "checkpoints": rows,
        "added": added,
    }


def _index(path: str, spec: AcousticsConfig, of_run: Mapping[str, Any]) -> Index:
    base = spec.shards or of_run.get("data", {}).get("shards", "")
    if not base:
        raise UserError(f"{path} does not say on which shards it was trained: name a set by shards=FOLDER")
    heldout, train = (storage.join(base, name) for name in (HELDOUT, TRAIN))
    if storage.exists(storage.join(heldout, MARKER)) and (index := Index.load(heldout)).count >= spec.utterances:
        return index
    return Index.load(train if storage.exists(storage.join(train, MARKER)) else base)


def _named(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a network by the names of their metrics."""
    return {f"acoustics_{layer}_{name}": value for layer in LAYERS for name, value in found[layer].items()}
