"""`cpcscale.fit`: a recogniser from a table in memory, by the procedure of `finetune`, without a run's folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpcscale import config as configs
from cpcscale.cluster.fold_tasks import run_folds
from cpcscale.emotion.audio.array_cache import AudioCacheConfig
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig
from cpcscale.emotion.corpora.csv_table import read_columns
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.encoders.networks import OpenedEncoder, encoder_digest
from cpcscale.emotion.inputs import prepare
from cpcscale.emotion.protocol.folds import FINAL, fold_splits
from cpcscale.errors import UserError
from cpcscale.experiments.encoders import open_encoder
from cpcscale.experiments.finetune import (
    FinetuneConfig,
    absolute_inputs,
    finetune,
    identify,
    kept_recognisers,
    recogniser_url,
    run_result,
)
from cpcscale.progress import Progress
from cpcscale.serve.encoder import Encoder
from cpcscale.serve.folder import is_taken, load_recogniser
from cpcscale.serve.recogniser import Recogniser

log = logging.getLogger(__name__)

# As in the shipped configs, in this process.
_DEFAULTS = ("publish=final", "fit.refit=true", "workers=1")


def fit(
    table: Any,
    system: str = "",
    encoder: Encoder | str | Path | None = None,
    out: str | Path | None = None,
    run_dir: str | Path | None = None,
    **keys: Any,
) -> Recogniser:
    """A recogniser that has learnt from all utterances of a table, with the scores of a cross-validation.

    `table` is a pandas DataFrame, an Arrow table or a mapping of columns, with the columns path, speaker, activation,
    valence and dominance; or the path of such a CSV, or of a folder that `finetune` reads as `corpus.path`. Paths in a
    table in memory are relative to the current folder. Labels are from 1 to 5, or as `corpus={"scale": [0, 1]}` says.

    `system` is precpc where an `encoder` is given (one that `cpcscale.load` gave, or what it takes), else functionals.
    `keys` are those of `cpcscale finetune --keys`, a group as a mapping: `protocol={"split": "loso"}`, or with its dot,
    as `**{"encoder.frozen": False}`. The procedure is that of `cpcscale finetune` with fit.refit=true, so that
    `model.scores` are what it would print, on speakers that the model of the fold did not know. It runs in this
    process; with workers=4, in four others.

    With `out`, the recogniser is saved to that folder too. With `run_dir`, the run is recorded as one of `finetune`:
    result.json, predictions.csv and the recogniser there, and a run in MLflow. Otherwise nothing is left on the disk.

    Raises UserError, in one line, for a table, a cell or audio that cannot be used, and for settings that do not fit.

    >>> fit({"path": ["a.wav"], "speaker": ["ann"]})
    Traceback (most recent call last):
    cpcscale.tables.TableError: the table has no column activation, valence, dominance: it needs path, speaker, \
activation, valence, dominance, and has path, speaker
    """
    if out is not None and is_taken(str(out)):
        raise UserError(f"out={out} exists: name another folder, or save it with model.save(FOLDER, force=True)")
    config = _config(system, encoder, run_dir, keys)
    config = dataclasses.replace(config, **absolute_inputs(config))
    corpus = _corpus(table, config.corpus)
    opened = (encoder.network, encoder.source) if isinstance(encoder, Encoder) else open_encoder(config)
    if run_dir:
        finetune(config, corpus=corpus, opened=opened)
        model = Recogniser(load_recogniser(recogniser_url(config.run_dir)))
    else:
        model = _fitted(config, corpus, opened)
    if out is not None:
        try:
            model.save(out)
        except (UserError, OSError) as error:
            # What took hours to fit is given all the same.
            log.warning("the recogniser is not saved to %s: %s; save it with model.save(FOLDER)", out, error)
    return model


def _config(
    system: str, encoder: Encoder | str | Path | None, run_dir: str | Path | None, keys: Mapping[str, Any]
) -> FinetuneConfig:
    given: dict[str, Any] = {"system": system or ("functionals" if encoder is None else "precpc")}
    if isinstance(encoder, Encoder) and not encoder.source["url"]:
        raise UserError(
            "the encoder of a recogniser may have learnt from the speakers of the table, and scores on them would be "
            "too high: give the folder or the name of the recogniser, which says whether it has, or the pretraining"
        )
    if encoder is not None:
        place = encoder.source["url"] if isinstance(encoder, Encoder) else encoder
        # A Path is a place, and never a name.
        given["encoder.checkpoint"] = str(place.absolute() if isinstance(place, Path) else place)
    if run_dir:
        given["run_dir"] = str(run_dir)
    texts = [f"{name}={json.dumps(value, default=str)}" for name, value in configs.leaves({**keys, **given})]
    config = configs.load(FinetuneConfig, None, [*_DEFAULTS, *texts])
    if encoder is not None and not config.definition.takes_network:
        raise UserError(f"system={config.system} takes no encoder: leave the encoder out, or use system=precpc")
    if config.ranks > 1 and not run_dir:
        raise UserError(f"ranks={config.ranks} needs Ray: pass run_dir=FOLDER too, or use `cpcscale finetune`")
    if config.publish == "none":
        raise UserError("publish=none keeps no recogniser, which is what fit is for: leave it out")
    return config


def _corpus(table: Any, settings: CorpusConfig) -> Corpus:
    if settings.path:
        raise UserError(f"corpus.path={settings.path} and a table are both given: give one")
    if isinstance(table, str | Path):
        return open_corpus(dataclasses.replace(settings, path=str(table)))
    rows: Sequence[Any] = ()
    if hasattr(table, "to_pydict"):
        columns = table.to_pydict()
    elif hasattr(table, "reset_index"):
        # audformat's tables have the file and its part as their index.
        named = [name for name in table.index.names if name is not None]
        if twice := next((name for name in named if name in table.columns), None):
            raise UserError(f"the table has {twice} as a column and in its index: pass table.reset_index(drop=True)")
        columns, rows = (table.reset_index() if named else table).to_dict("list"), table.index
    elif isinstance(table, Mapping):
        columns = dict(table)
    else:
        raise UserError(
            f"a {type(table).__name__} is no table: pass a pandas DataFrame, an Arrow table or the path of a CSV, with "
            "the columns path, speaker, activation, valence, dominance"
        )
    return read_columns(columns, settings, rows)


def _fitted(config: FinetuneConfig, corpus: Corpus, opened: OpenedEncoder) -> Recogniser:
    """What `finetune` does, without its folder, its tracked run and, of one worker, its processes."""
    # A protocol that does not fit is said before all audio is read.
    fold_splits(config, corpus)
    started, identity = time.monotonic(), identify(config, corpus) | {"encoder": encoder_digest(opened[0])}
    with tempfile.TemporaryDirectory(prefix="cpcscale-") as place:
        if config.audio_cache == AudioCacheConfig():
            config = dataclasses.replace(config, audio_cache=AudioCacheConfig(path=place))
        prepared = prepare(config, corpus, opened)
        if config.workers > 1:
            results = run_folds(config, prepared, config.workers, 1, config.publish)
        else:
            numbers, results = (*range(len(prepared.folds.splits)), FINAL), []
            with Progress(f"fit {config.system}", len(numbers), "folds") as progress:
                for done, number in enumerate(numbers, 1):
                    results.append(run_fold(config, prepared, number, keep=number == FINAL, publish=True))
                    progress.update(done)
        result = run_result(config, prepared, results, identity, started)
        *_, (_, saved) = kept_recognisers(config, prepared, results, result)
    return Recogniser(saved)
