"""cpcscale: contrastive-predictive-coding pretraining for speech emotion, at any size.

>>> import cpcscale
>>> model = cpcscale.load("emotion-small")
>>> model.predict("call.wav").activation  # doctest: +SKIP
3.1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from cpcscale.experiments.fit import fit as fit
    from cpcscale.serve.encoder import Encoder as Encoder
    from cpcscale.serve.encoder import Frames as Frames
    from cpcscale.serve.recogniser import Prediction as Prediction
    from cpcscale.serve.recogniser import Predictions as Predictions
    from cpcscale.serve.recogniser import Recogniser as Recogniser

__version__ = "0.2.0"
__all__ = ["Encoder", "Frames", "Prediction", "Predictions", "Recogniser", "fit", "load"]


def load(model: str | Path) -> Any:
    """What lies at a path or s3:// URL, or has a name in MLflow, ready to use: a `Recogniser` or an `Encoder`.

    A folder that `finetune publish=final`, `fit` or `save` wrote gives a Recogniser, and so do models:/NAME@ALIAS and
    models:/NAME/VERSION of the registry of MLFLOW_TRACKING_URI, else of runs/mlflow.db. The run_dir of a `cpcscale
    pretrain` gives the Encoder of its newest checkpoint, the folder of a checkpoint that one, and so does models:/ of
    one that was registered; hf:NAME and hf:FOLDER are networks of the transformers library. The bare name of a released
    recogniser, such as emotion-small, is the one that the package brings, even if the current folder has one of that
    name: "./emotion-small", or a Path, is that folder. Raises UserError where there is none, or a torn or newer one.

    >>> load("runs/none")
    Traceback (most recent call last):
    cpcscale.errors.UserError: no recogniser at runs/none: name the folder of one, such as RUN_DIR/recogniser
    """
    from cpcscale.serve.models import opened_model
    from cpcscale.tracking.registry import opened

    # A Path is a place, and never a name.
    name = model if isinstance(model, str) else str(model.absolute())
    with opened(name) as place:
        return opened_model(place, name)


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds to import, and `import cpcscale` shall not.
    if name == "fit":
        from cpcscale.experiments.fit import fit

        return fit
    if name in __all__:
        from cpcscale.serve import encoder, recogniser

        return next(getattr(room, name) for room in (encoder, recogniser) if hasattr(room, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
