"""Voice activity: how likely there is speech in each 32 ms.

The network is silero's (https://github.com/snakers4/silero-vad), MIT licence, in silero_vad.LICENSE.txt: the file
silero_vad_16k_sequence.onnx of silero-vad 6.2.3, which takes many frames a call. It stands here because the package
asks for PyTorch, and brings nine times as much. T frames, S samples.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

# Samples of a frame at 16 kHz, and how many before them the network sees too.
FRAME = 512
_CONTEXT = 64
_NETWORK = Path(__file__).with_name("silero_vad.onnx")
_WIDTH = 128
_ERRORS_ONLY = 3


class VoiceActivity:
    """The network and what it remembers of the frames before, so that audio may come in blocks of any length."""

    def __init__(self) -> None:
        self._context_S = np.zeros((1, _CONTEXT), np.float32)
        self._h = self._c = np.zeros((1, 1, _WIDTH), np.float32)

    def __call__(self, frames_TS: np.ndarray) -> np.ndarray:
        """The probability of speech, float32 [T], in the next frames, float32 [T, 512] in [-1, 1)."""
        before_TS = np.concatenate([self._context_S, frames_TS[:-1, -_CONTEXT:]])
        self._context_S = frames_TS[-1:, -_CONTEXT:]
        inputs = {"input": np.concatenate([before_TS, frames_TS], axis=1), "h": self._h, "c": self._c}
        probability_T, self._h, self._c = _session().run(["speech_probs", "hn", "cn"], inputs)
        return probability_T


@cache
def _session() -> onnxruntime.InferenceSession:
    """One for the process. It has one thread: the network is too small for more, and callers run side by side."""
    # Else it gives this machine a number in ~/.cache, and reports to its makers (from 1.30 on).
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    # Else it warns of hardware that it does not use.
    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    return onnxruntime.InferenceSession(str(_NETWORK), options, providers=["CPUExecutionProvider"])
