"""The code of a recogniser in MLflow: the `model.py` of each logged model is a copy of this file.

MLflow runs it where a model is loaded or served, maybe beside another version of cpcscale: it uses its public names.
"""

from __future__ import annotations

from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from pandas import DataFrame

import cpcscale


class ServedRecogniser(PythonModel):
    """Takes a column `audio`, the bytes of an audio file in each row; gives for each what `predict --json` prints."""

    def load_context(self, context: Any) -> None:
        self._recogniser = cpcscale.load(context.artifacts["recogniser"])

    def predict(self, context: Any, model_input: DataFrame, params: Any = None) -> list[dict[str, Any]]:
        rows = [self._recogniser.predict(bytes(audio)).row() for audio in model_input["audio"]]
        return [{name: None if cell == "" else cell for name, cell in row.items()} for row in rows]


set_model(ServedRecogniser())
