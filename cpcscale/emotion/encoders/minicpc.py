"""miniCPC: an encoder pretrained on the audio of the labelled corpus itself, one a fold (Li et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

from cpcscale import storage
from cpcscale.model.cpc import CPC
from cpcscale.shards.pack import TRAIN, PackConfig, pack_sources
from cpcscale.shards.packing.sources import AudioFile
from cpcscale.train.checkpoint import load_encoder
from cpcscale.train.loop import pretrain
from cpcscale.train.observer import SilentObserver
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.setup import Data

# Raise it when the same audio, recipe and seed give other weights: cached networks are then trained again.
VERSION = 1


def pretrain_on(sources: Sequence[AudioFile], recipe: Recipe, folder: str) -> CPC:
    """A network pretrained on these files alone, in this process; its shards and checkpoints are below `folder`.

    The order of training depends on the names of the sources, not on their paths. Pass only files of the training
    speakers of one outer fold: an encoder trained on audio of a test speaker would make the test unfair. If `folder`
    holds a finished pretraining of the same files and recipe, that is used.
    """
    packed = pack_sources(sources, storage.join(folder, "shards"), PackConfig())
    run_dir = storage.join(folder, "run")
    pretrain(recipe, Data(packed.splits[TRAIN], {}), run_dir, Ranks.current(), SilentObserver())
    return load_encoder(run_dir)[0]
