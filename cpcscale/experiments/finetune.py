"""Cross-validated fine-tuning: the driver checks and prepares, the folds run side by side, in one tracked run."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.cluster import fold_tasks
from cpcscale.cluster.fold_tasks import check_ranks, run_folds
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.crossval import FoldResult
from cpcscale.emotion.encoders.networks import OpenedEncoder, encoder_digest
from cpcscale.emotion.encoders.of_recogniser import PRETRAINING_AUDIO
from cpcscale.emotion.finetune_result import FinetuneResult, combine_folds, held_out
from cpcscale.emotion.inputs import PreparedCorpus, prepare
from cpcscale.emotion.probe_selection import refuse_selected
from cpcscale.emotion.protocol.folds import FINAL, fold_splits, marks
from cpcscale.emotion.protocol.splits import Folds
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.systems.handmade import HandmadeFeatures
from cpcscale.errors import UserError
from cpcscale.experiments.encoders import absolute_checkpoint, kept_of, open_encoder
from cpcscale.experiments.published import tracked_model
from cpcscale.experiments.tracked_run import about_recognisers, tracked_run
from cpcscale.serve.card import recogniser_scores
from cpcscale.serve.folder import SavedRecogniser, is_recogniser, save_recogniser
from cpcscale.serve.shift import measure_shift
from cpcscale.storage.marked_folder import MARKER
from cpcscale.tracking.about import About, DataInput
from cpcscale.tracking.model_folder import TrackedModel
from cpcscale.tracking.store import TrackingConfig
from cpcscale.tracking.tracker import Tracker, settle

log = logging.getLogger(__name__)

RESULT = "result.json"
PREDICTIONS = "predictions.csv"


@dataclass(kw_only=True)
class FinetuneConfig(EmotionRecipe):
    """A fine-tuning run: the recipe and where it runs."""

    # Folder (or s3:// prefix) of the run. If it holds the finished result, nothing is run again.
    run_dir: str = field(default="runs/finetune", metadata=configs.PLACE)
    # Folds that run at the same time; the cores are divided among them.
    workers: int = field(default=2, metadata=configs.PLACE)
    # Processes that train one fold together, each on a GPU of its own where there are GPUs. They divide each batch; the
    # CCC loss is still that of the whole batch.
    ranks: int = field(default=1, metadata=configs.PLACE)
    # Which recognisers are kept, below run_dir. final: recogniser/, fitted on all labelled speakers. folds: also
    # recogniser/fold-0/ and so on, which test speakers tell nothing. none: no recogniser, only its figures.
    publish: Literal["none", "final", "folds"] = field(default="none", metadata=configs.PLACE)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=configs.PLACE)

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.at_least(1, workers=self.workers, ranks=self.ranks)
        check_ranks(self, self.ranks)
        if self.publish != "none" and self.speaker_norm:
            raise UserError(
                "speaker_norm=true scales an utterance by all audio of its speaker, so that a recogniser cannot be "
                "applied to one file: use publish=none, or speaker_norm=false"
            )


def finetune(
    config: FinetuneConfig,
    *,
    parent: str | None = None,
    corpus: Corpus | None = None,
    opened: OpenedEncoder | None = None,
) -> FinetuneResult:
    """Runs all folds, writes result.json and predictions.csv to `run_dir`, and returns the result.

    If `run_dir` already holds the result of the same config, corpus and encoder, that one is returned. `parent` is the
    id of the tracked run that this one belongs to; `corpus` and `opened` are the config's corpus and encoder, if they
    are open already. Mistakes of the user raise UserError before Ray starts or a file is written.
    """
    config = dataclasses.replace(config, run_dir=storage.absolute(config.run_dir), **absolute_inputs(config))
    if parent is None:
        config.check_readout()
    settle(config.tracking, config.run_dir, "finetune")
    corpus = open_corpus(config.corpus) if corpus is None else corpus
    folds = fold_splits(config, corpus)
    opened = encoder, source = open_encoder(config) if opened is None else opened
    refuse_selected(config, corpus, source)
    identity = identify(config, corpus) | {"encoder": encoder_digest(encoder)}
    kept = {"none": [], "final": [FINAL], "folds": [FINAL, *range(len(folds.splits))]}[config.publish]
    published = all(is_recogniser(recogniser_url(config.run_dir, fold)) for fold in kept)
    if (done := finished_result(config.run_dir, identity)) is not None and published:
        log.warning("%s holds this run, finished: it is not run again", config.run_dir)
        return done
    # A start that was stopped, maybe of another config, can have left its own.
    for fold in (*range(len(folds.splits)), FINAL):
        storage.remove(storage.join(recogniser_url(config.run_dir, fold), MARKER))
    started = time.monotonic()
    fold_tasks.check_cluster_size(config, config.ranks, config.workers)
    prepared = prepare(config, corpus, opened)
    fold_tasks.connect(config, config.ranks, config.workers)
    with tracked_run(
        config.tracking,
        None,
        config.run_dir,
        kind="finetune",
        name=config.name or config.system,
        tags=run_tags(config, corpus, folds, identity, source),
        params=configs.flat(config),
        about=_about(config, corpus, source),
        parent=parent,
    ) as (tracker, summary):
        results = run_folds(config, prepared, config.workers, config.ranks, config.publish)
        result = run_result(config, prepared, results, identity, started, tracker.run_id)
        text = json.dumps(result.as_dict(), indent=1) + "\n"
        _track(result, text, tracker)
        for fold, saved in kept_recognisers(config, prepared, results, result):
            url = recogniser_url(config.run_dir, fold)
            save_recogniser(url, saved)
            tracker.model(_tracked_model(url, fold, saved, result))
        storage.write(storage.join(config.run_dir, PREDICTIONS), result.predictions_csv.encode())
        summary.update({f"ccc_{name}": value for name, value in result.ccc.items()})
    # Written last: a run folder that has it is complete, and so is its tracked run.
    storage.write(storage.join(config.run_dir, RESULT), text.encode())
    return result


def absolute_inputs(recipe: EmotionRecipe) -> dict[str, Any]:
    """The fields of a recipe that hold local paths, made absolute, because workers run in other folders."""
    path, checkpoint = recipe.corpus.path, recipe.encoder.checkpoint
    return {
        "corpus": dataclasses.replace(recipe.corpus, path=storage.absolute(path) if path else ""),
        "encoder": dataclasses.replace(recipe.encoder, checkpoint=absolute_checkpoint(checkpoint)),
    }


def identify(recipe: EmotionRecipe, corpus: Corpus) -> dict[str, str]:
    """Digests of the config and the corpus, on which a result depends; paths and the run's name do not count."""
    placeless = dataclasses.replace(
        recipe,
        name="",
        corpus=dataclasses.replace(recipe.corpus, path=""),
        encoder=dataclasses.replace(recipe.encoder, checkpoint=""),
    )
    return {"config": configs.digest(placeless), "corpus": corpus.digest}


def run_tags(
    recipe: EmotionRecipe, corpus: Corpus, folds: Folds, identity: dict[str, str], source: dict[str, Any]
) -> dict[str, str]:
    """The MLflow tags of a run on this corpus; `source` describes the encoder's checkpoint (empty: none)."""
    tags = {
        "cpcscale.system": recipe.system,
        "cpcscale.corpus": corpus.name,
        "cpcscale.protocol": recipe.protocol.split,
        "cpcscale.marks": ",".join(marks(recipe, corpus, folds)),
        "cpcscale.config_hash": identity["config"],
        "cpcscale.corpus_hash": identity["corpus"],
    }
    if source:
        tags["cpcscale.encoder"] = str(source["url"])
        tags["cpcscale.encoder_chosen"] = str(source.get("chosen", ""))
    # Other systems take only the architecture from the checkpoint, nothing that was learnt from its data.
    if source and recipe.definition.takes_weights:
        tags["cpcscale.fingerprint"] = str(source["fingerprint"])
    return tags


def finished_result(run_dir: str, identity: dict[str, str]) -> FinetuneResult | None:
    """The result that `run_dir` holds, or None. Raises UserError when it is of another config, corpus or encoder."""
    url = storage.join(run_dir, RESULT)
    if not storage.exists(url):
        return None
    try:
        stored = configs.read_json(storage.read(url))
        result = FinetuneResult(**stored, predictions_csv=storage.read(storage.join(run_dir, PREDICTIONS)).decode())
    except (ValueError, TypeError) as error:
        raise UserError(f"{url} is not the result of a fine-tuning ({error}): choose another run_dir") from None
    changed = [name for name, value in identity.items() if result.identity.get(name) != value]
    if changed:
        raise UserError(
            f"run_dir={run_dir} holds a finished run with another {' and '.join(changed)}: pass run_dir=FOLDER with a "
            "new one, or remove it"
        )
    return result


def _about(config: FinetuneConfig, corpus: Corpus, source: dict[str, Any]) -> About:
    # Other systems take only the architecture from the checkpoint.
    learnt = source if config.definition.takes_weights else {}
    pretrained = [
        DataInput(f"pretraining of {storage.shown(url)}", str(learnt["fingerprint"]), url, "pretraining", {})
        for url in [str(learnt.get("url", ""))]
        if url
    ]
    name, seed = config.name or config.system, f"seed{config.seed}"
    title = f"{name if seed in name else f'{name}-{seed}'} on {corpus.name}"
    what = f"Fine-tuning of {config.system} with {config.regressor}, seed {config.seed},"
    return about_recognisers(title, what, config, {config.corpus.path: corpus}, pretrained)


def run_result(
    recipe: EmotionRecipe,
    prepared: PreparedCorpus,
    results: Sequence[FoldResult],
    identity: dict[str, str],
    started: float,
    run_id: str = "",
) -> FinetuneResult:
    """The result of the folds of a run that began at `started`, by time.monotonic()."""
    return dataclasses.replace(
        combine_folds(recipe, prepared, [each for each in results if each.split.fold != FINAL]),
        seconds=time.monotonic() - started,
        identity=identity,
        encoder_chosen=str(prepared.source.get("chosen", "")),
        run_id=run_id,
    )


def kept_recognisers(
    recipe: EmotionRecipe, prepared: PreparedCorpus, results: Sequence[FoldResult], result: FinetuneResult
) -> Iterator[tuple[int, SavedRecogniser]]:
    """(fold, recogniser) of those that were kept; the one on all speakers is the last."""
    kept = [each for each in results if each.recogniser is not None]
    known = held_out(recipe, prepared, results) if kept else None
    for each in kept:
        assert each.recogniser is not None
        learnt = each.split.train_rows + each.split.dev_rows
        groups = {prepared.folds.groups[row] for row in learnt}
        scores = recogniser_scores(
            result,
            kept_of(recipe, prepared.corpus, prepared.source),
            utterances=len(learnt),
            speakers=len(groups),
            licences=_licences(recipe, prepared),
            training_rows=each.recogniser.training_rows,
        )
        if each.split.fold == FINAL and prepared.waves is not None:
            scores["shift"] = measure_shift(each.recogniser, prepared.waves)
        yield each.split.fold, SavedRecogniser(each.recogniser, scores, known)


def _tracked_model(url: str, fold: int, saved: SavedRecogniser, result: FinetuneResult) -> TrackedModel:
    if fold == FINAL:
        return tracked_model(url, "recogniser", saved)
    # Its figures are those on its own test speakers: the run's are of all folds together.
    own = next(table["ccc"] for table in result.folds if table["fold"] == fold)
    model = tracked_model(url, f"recogniser-fold-{fold}", saved)
    tags = model.tags | {f"cpcscale.ccc_{key}": str(own[key]) for key in own if f"cpcscale.ccc_{key}" in model.tags}
    return dataclasses.replace(model, tags=tags, scores={f"fold{fold}_ccc_{key}": own[key] for key in own})


def _licences(recipe: EmotionRecipe, prepared: PreparedCorpus) -> dict[str, str]:
    """The licences of all that the recogniser is made from; unknown where nobody says."""
    found = {f"corpus {prepared.corpus.name}": prepared.corpus.licence}
    if recipe.definition.takes_weights:
        found[PRETRAINING_AUDIO] = recipe.encoder.licence or str(prepared.source.get("licence", "unknown"))
    for part in prepared.parts or (prepared,):
        if isinstance(part.features, HandmadeFeatures) and part.features.licence:
            found["features"] = part.features.licence
    return found


def recogniser_url(run_dir: str, fold: int = FINAL) -> str:
    """Where a run keeps the recogniser on all labelled speakers, or that of a fold."""
    whole = storage.join(run_dir, "recogniser")
    return whole if fold == FINAL else storage.join(whole, f"fold-{fold}")


def _track(result: FinetuneResult, text: str, tracker: Tracker) -> None:
    for row in result.curves:
        names = {f"fold{row['fold']}_{name}": row[name] for name in ("train_loss", "dev_ccc")}
        tracker.log(row["epoch"], names)
    tracker.artifact(PREDICTIONS, result.predictions_csv)
    tracker.artifact(RESULT, text)
    ccc = ", ".join(f"{name} {value:.3f}" for name, value in result.ccc.items())
    tracker.outcome(" ".join([f"CCC on speakers it did not know: {ccc}", *result.marks]))
