"""What a system is: what its recogniser takes as input, and where that comes from. One file a system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from cpcscale.emotion.audio.windows import Waves
    from cpcscale.emotion.encoders.arrays import Arrays
    from cpcscale.emotion.inputs import PreparedCorpus
    from cpcscale.emotion.protocol.splits import Split
    from cpcscale.emotion.recipe import EmotionRecipe
    from cpcscale.model.layers import LayeredNetwork

Regressor = Literal["mean", "svr", "ridge", "attention"]


class Features(Protocol):
    """Turns int16 audio at 16 kHz into the input of a head.

    `name` is for people, `digest` changes when the same audio may give other values: the cache knows features by both.
    `whole`: it takes whole utterances and gives a vector [F] of each; else windows of them, and frames [T, C].
    """

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def whole(self) -> bool: ...
    @property
    def least_samples(self) -> int:
        """Shorter audio is repeated up to this."""

    def __call__(self, waves: Sequence[Any]) -> list[np.ndarray]:
        """One array for each waveform [S] of at least `least_samples`; if `whole`, they are audio.Sliced."""

    def description(self) -> dict[str, Any]:
        """What they are, in plain values; with `arrays`, all that they are made again from."""

    def arrays(self) -> Arrays: ...


class System:
    """A system, by its `system=` in a config. A new one is a subclass in a file of its own, and a line in SYSTEMS."""

    # Its `system=`.
    name: str
    # Of a fusion, the systems that it is made of.
    parts: tuple[System, ...] = ()
    # The regressors that it can have; the first is that of head=auto.
    regressors: tuple[Regressor, ...] = ("attention", "svr", "ridge")
    # Whether it takes the network of encoder.checkpoint, or of pretraining.model where none is given.
    takes_network: bool = False
    # Whether encoder.checkpoint must be given.
    needs_checkpoint: bool = False
    # Whether it takes what that checkpoint has learnt, not only its architecture.
    takes_weights: bool = False
    # Whether it pretrains a network itself.
    pretrains: bool = False
    # Whether weights of its network are drawn at random, so that its features depend on the seed.
    draws_weights: bool = False
    # Why a sweep makes no sense; empty where it does.
    not_swept: str = ""

    def shown(self, recipe: EmotionRecipe) -> str:
        """Its name in tables, with which of its features it has, where there are several."""
        return self.name

    def check(self, recipe: EmotionRecipe) -> None:
        """Raises UserError for settings of the recipe that this system cannot have."""

    def trains_encoder(self, recipe: EmotionRecipe) -> bool:
        """Whether the fit updates the encoder's weights too."""
        return False

    def encoder_rate(self, recipe: EmotionRecipe) -> float:
        """The learning rate of an encoder that is trained."""
        return recipe.encoder.learning_rate

    def marks(self, recipe: EmotionRecipe) -> list[str]:
        """The marks of a result that used audio of test speakers before testing."""
        return ["SPEAKER-ADAPTED"] * recipe.speaker_norm

    def pretrain(self, recipe: EmotionRecipe, waves: Waves, encoder: LayeredNetwork | None) -> LayeredNetwork | None:
        """The network that all folds share, in place of `encoder`, the one of the checkpoint."""
        return encoder

    def shared_features(self, recipe: EmotionRecipe, encoder: LayeredNetwork | None) -> Features | None:
        """The features that are the same in all folds; None: each fold makes its own."""
        raise NotImplementedError

    def fold_features(self, recipe: EmotionRecipe, prepared: PreparedCorpus, split: Split) -> Features:
        """The features of a fold, from its training speakers alone, where they are not shared."""
        raise NotImplementedError
