"""cpcscale: contrastive-predictive-coding pretraining for speech emotion, at any size.

>>> import cpcscale
>>> model = cpcscale.load("runs/quickstart/precpc/recogniser")  # doctest: +SKIP
>>> model.predict("call.wav").activation  # doctest: +SKIP
3.1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpcscale.experiments.fit import fit as fit
    from cpcscale.serve.encoder import Encoder as Encoder
    from cpcscale.serve.encoder import Frames as Frames
    from cpcscale.serve.models import load as load
    from cpcscale.serve.recogniser import Prediction as Prediction
    from cpcscale.serve.recogniser import Predictions as Predictions
    from cpcscale.serve.recogniser import Recogniser as Recogniser

__version__ = "0.2.0"
__all__ = ["Encoder", "Frames", "Prediction", "Predictions", "Recogniser", "fit", "load"]


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds to import, and `import cpcscale` shall not.
    if name == "fit":
        from cpcscale.experiments.fit import fit

        return fit
    if name in __all__:
        from cpcscale.serve import encoder, models, recogniser

        return next(getattr(room, name) for room in (models, encoder, recogniser) if hasattr(room, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
