"""cpcscale: contrastive-predictive-coding pretraining for speech emotion, at any size.

>>> import cpcscale
>>> model = cpcscale.load("runs/quickstart/precpc/recogniser")  # doctest: +SKIP
>>> model.predict("call.wav").activation  # doctest: +SKIP
3.1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from cpcscale.serve.recogniser import Prediction as Prediction
    from cpcscale.serve.recogniser import Predictions as Predictions
    from cpcscale.serve.recogniser import Recogniser as Recogniser

__version__ = "0.2.0"
__all__ = ["Prediction", "Predictions", "Recogniser", "load"]


def load(model: str | Path) -> Recogniser:
    """The recogniser in a folder, local or s3://, or of MLflow's registry: models:/NAME@ALIAS, models:/NAME/VERSION.

    The registry is that of MLFLOW_TRACKING_URI, else of runs/mlflow.db. Raises UserError where there is none, and for a
    torn or newer one.
    """
    from cpcscale.serve.recogniser import load
    from cpcscale.tracking.registry import opened

    with opened(str(model)) as folder:
        return load(folder)


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds to import, and `import cpcscale` shall not.
    if name in __all__:
        from cpcscale.serve import recogniser

        return getattr(recogniser, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
