"""The code of a recogniser or an encoder in MLflow: the `model.py` of each logged model is a copy of this file.

MLflow runs it where a model is loaded or served, maybe beside another version of cpcscale: it uses its public names.
"""

from __future__ import annotations

from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from pandas import DataFrame

import cpcscale
from cpcscale.errors import AudioError


class ServedModel(PythonModel):
    """Takes a column `audio`, the bytes of an audio file in each row.

    A recogniser gives for each what `predict --json` prints. An encoder gives a vector, the mean over time of its layer
    c: of one length for any audio, as a search, a clustering or a classifier takes it. Its frames are a hundred such
    vectors a second, megabytes of JSON; `cpcscale features` and `cpcscale.load(...).encode(...)` give them as arrays.
    """

    def load_context(self, context: Any) -> None:
        [folder] = context.artifacts.values()
        self._model = cpcscale.load(folder)

    def predict(self, context: Any, model_input: DataFrame, params: Any = None) -> list[dict[str, Any]]:
        answer = self._vector if isinstance(self._model, cpcscale.Encoder) else self._row
        return [answer(bytes(audio)) for audio in model_input["audio"]]

    def _row(self, audio: bytes) -> dict[str, Any]:
        row = self._model.predict(audio).row()
        return {name: None if cell == "" else cell for name, cell in row.items()}

    def _vector(self, audio: bytes) -> dict[str, Any]:
        try:
            found = self._model.encode(audio)
        except AudioError as error:
            return {"seconds": None, "vector": None, "reason": error.cause}
        seconds = round(len(found.frames) * self._model.hop_s, 3)
        return {"seconds": seconds, "vector": found.frames.mean(axis=0).tolist(), "reason": None}


set_model(ServedModel())
