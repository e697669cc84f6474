"""Small saved recognisers for the tests of what is done with saved ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import cpcscale
from cpcscale.emotion.fitted import FittedRecogniser, MeanHead, VectorHead
from cpcscale.emotion.heads.svm import SupportVectors
from cpcscale.emotion.systems.functionals import Functionals
from cpcscale.experiments.published import tracked_model
from cpcscale.serve.folder import SavedRecogniser, load_recogniser, save_recogniser
from cpcscale.tracking.model_folder import TrackedModel


def put_recogniser(folder: Path, ccc: float, fitted: FittedRecogniser | None = None, **changed: object) -> str:
    """A recogniser with a mean CCC of `ccc`, saved in the folder; by default it gives the same for all audio."""
    fitted = fitted or FittedRecogniser("mean", None, MeanHead(np.array([0.1, 0.2, 0.3])), 10.0, (1.0, 5.0))
    scores = {
        "system": fitted.system,
        "corpus": "tones",
        "protocol": "speakers3",
        "marks": [],
        "learnt_from": {"utterances": 36, "speakers": 6},
        "tested_on": {"utterances": 36, "speakers": 6},
        "ccc": dict.fromkeys(("activation", "valence", "dominance", "mean"), ccc),
        "interval": None,
        "digests": {"config": "c" * 64, "corpus": "d" * 64},
        "encoder": {},
        "licences": {"corpus tones": "unknown"},
        "training_rows": fitted.training_rows,
        "versions": {"cpcscale": cpcscale.__version__},
        **changed,
    }
    save_recogniser(str(folder), SavedRecogniser(fitted, scores))
    return str(folder)


def support_vectors() -> FittedRecogniser:
    """Two rows of training data in each of its machines, three in all."""
    features = Functionals().features()
    rows_VF = np.stack([np.full(66, value) for value in (0.1, 0.2, 0.3)])
    ones, half_V = np.ones(66), np.full(2, 0.5)
    head = VectorHead(
        "svr",
        tuple(
            SupportVectors(0 * ones, ones, rows_VF[pair], np.array(-1.0), half_V, np.array(0.0))
            for pair in ([0, 1], [0, 2], [1, 2])
        ),
    )
    return FittedRecogniser("functionals", features, head, 10.0, (1.0, 5.0))


def model_of(url: str) -> TrackedModel:
    return tracked_model(url, "recogniser", load_recogniser(url))
