"""`cpcscale pretrain`: checks config and data, takes the run's lease, starts its tracked run, then the workers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.cluster import session
from cpcscale.cluster.capacity import extra_cores, wait_for_capacity
from cpcscale.cluster.pretrain_config import PretrainConfig, with_absolute_paths
from cpcscale.cluster.pretrain_data import audio_to_pack, checked_data, pack_audio
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.errors import UserError, optional
from cpcscale.experiments.tracked_run import tracked_run
from cpcscale.progress import note
from cpcscale.runs.lease import Lease, hold, wait_until_free
from cpcscale.runs.ledger import Ledger
from cpcscale.runs.probe_log import Probes, ProbeSet
from cpcscale.shards.index import Index
from cpcscale.storage.place import check_place
from cpcscale.tracking.about import About, DataInput
from cpcscale.tracking.tracker import Tracker, settle
from cpcscale.train import checkpoint, resume
from cpcscale.train.checkpoint import RestoredCheckpoint

if TYPE_CHECKING:
    from cpcscale.cluster.probe_beside import RunProbes


def pretrain(config: PretrainConfig, *, take_over: bool = False) -> dict[str, Any]:
    """Runs or resumes a pretraining and returns the summary of train.loop.pretrain, with `run_id` and `run_dir`.

    Mistakes of the user raise UserError before a worker starts or a file is written; so does a run that another live
    driver holds, unless `take_over`. Raises OvertakenError when another driver takes this run over.
    """
    config = with_absolute_paths(config)
    storage.configure(config.storage)
    folder = storage.local_path(config.run_dir)
    if folder and folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir={storage.shown(config.run_dir)} is a file: name a folder for the run")
    settle(config.tracking, config.run_dir, "pretrain")
    ledger = Ledger(config.run_dir)
    restored = checkpoint.load_newest(ledger, ledger.head())
    origin = _origin(config, restored)
    # A shard set is checked before Ray starts; audio that has to be packed first, once there is room for the run.
    audio = audio_to_pack(config)
    data = None if audio else checked_data(config, restored)
    labelled = _probe_set(config)
    before = wait_until_free(ledger, take_over=take_over, say=_say)
    check_place(ledger.folder, briefly=True)
    with session.connected(config.least_workers + extra_cores(config, config.least_workers)):
        gpu = wait_for_capacity(config, _say)
        if audio:
            pack_audio(config, audio)
        data = data or checked_data(config, restored)
        gone = before.holder.id if before.holder else ""
        with hold(config.run_dir, config.lease, take_over=take_over, say=_say, gone=gone) as lease:
            return _tracked(config, data.train, origin, labelled, gpu, lease)


def _say(text: str) -> None:
    note(f"pretrain: {text}")


def _origin(config: PretrainConfig, restored: RestoredCheckpoint | None) -> dict[str, str]:
    """Tags that name the checkpoint a new run starts from; none for a run from scratch or a resumed one."""
    initial = resume.initial_network(restored, config)
    if not initial:
        return {}
    return {f"cpcscale.init_{name}": str(initial[1][name]) for name in ("url", "step", "fingerprint")}


def _probe_set(config: PretrainConfig) -> tuple[Corpus, ProbeSet] | None:
    """The labelled set that checkpoints are probed on, checked; None where there is none."""
    if not config.probe.is_on:
        return None
    # Imported here: it loads the code of recognisers, which a run without a probe does not need.
    from cpcscale.cluster.probe_beside import check_probe

    return check_probe(config)


def _probing(
    config: PretrainConfig, labelled: tuple[Corpus, ProbeSet] | None, tracker: Tracker
) -> AbstractContextManager[RunProbes | None]:
    if labelled is None:
        Probes(config.run_dir).retire_set()
        return nullcontext()
    from cpcscale.cluster.probe_beside import run_probes

    return run_probes(config, *labelled, tracker)


def _tracked(
    config: PretrainConfig,
    train: Index,
    origin: Mapping[str, str],
    labelled: tuple[Corpus, ProbeSet] | None,
    gpu: bool,
    lease: Lease,
) -> dict[str, Any]:
    # Imported here: it loads Ray Train, which takes seconds that a mistyped config should not wait for.
    from cpcscale.cluster.trainer import fit

    own = {"cpcscale.config_hash": configs.digest(config), "cpcscale.fingerprint": train.fingerprint}
    counts = {"utterances": train.count, "shards": train.shards.num_rows, "hours": round(train.duration_s / 3600, 4)}
    of = f"{train.count:,} utterances, {counts['hours']:.2f} h"
    name = storage.shown(config.data.shards)
    about = About(
        f"{config.name}-seed{config.seed} on {name}",
        f"Pretraining of the {config.model.size} network on {name}: {of}; seed {config.seed}",
        (DataInput(name, train.fingerprint, train.base, "training", counts),),
    )
    with (
        tracked_run(
            config.tracking,
            lease,
            config.run_dir,
            kind="pretrain",
            name=config.name,
            tags=own | dict(origin) | (labelled[1].tags() if labelled else {}),
            params=configs.flat(config),
            about=about,
        ) as (tracker, _),
        _probing(config, labelled, tracker) as probes,
    ):
        summary = fit(config, train.fingerprint, gpu, tracker, lease.id, probes.wake if probes else None)
        summary |= {"probe": probes.finish()} if probes else {}
        if config.publish == "final":
            # As above.
            from cpcscale.experiments.published import tracked_encoder

            with optional(f"the encoder of {config.run_dir} is not logged to MLflow", "`cpcscale register` can do it"):
                tracker.model(tracked_encoder(config.run_dir))
        tracker.outcome(_outcome(summary))
    return {**summary, "run_id": tracker.run_id, "run_dir": config.run_dir}


def _outcome(summary: Mapping[str, Any]) -> str:
    """What came of the run, in a line."""
    scored = {"training": summary} | {name: summary[name] for name in ("heldout", "unseen") if name in summary}
    accuracy = ", ".join(f"{name} {scores['accuracy_mean']:.3f}" for name, scores in scored.items())
    heard = f"{summary['steps']:,} steps on {summary['audio_s'] / 3600:.2f} h of audio"
    return f"{heard}; InfoNCE accuracy: {accuracy} (chance {summary['accuracy_chance']:.4f})"
