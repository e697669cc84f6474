"""The driver's observer of a pretraining: a progress bar or lines on the terminal, and all metrics to the tracker."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cpcscale.progress import Progress, note
from cpcscale.shards.pack import HELDOUT, UNSEEN
from cpcscale.tracking.tracker import Tracker

QUARANTINE_COLUMNS = ("shard", "key", "number", "cause", "why", "step")


class Console:
    """An `Observer` in the driver, to which the workers' events are delivered."""

    def __init__(self, tracker: Tracker, on_saved: Callable[[], None] | None = None) -> None:
        """`on_saved` is called after each published checkpoint."""
        self._tracker, self._on_saved, self._detail = tracker, on_saved, ""
        self._bar: Progress | None = None
        # Whether the workers have made a step yet.
        self.working = False

    def note(self, text: str) -> None:
        note(f"pretrain: {text}")

    def progress(self, step: int, total: int) -> None:
        self.working = True
        if self._bar is None:
            self._bar = Progress("pretrain", total, "steps")
        self._bar.update(step, self._detail)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._tracker.log(step, values)
        if "loss" in values:
            self._detail = (
                f"loss {values['loss']:.3f}, accuracy {values['accuracy_mean']:.3f}, "
                f"{values['audio_s_per_s']:.0f} audio s/s, waiting {values['data_wait_share']:.1%}"
            )
        for name in (HELDOUT, UNSEEN):
            if f"{name}_loss" in values:
                note(
                    f"pretrain: step {step}, {name}: loss {values[f'{name}_loss']:.3f}, accuracy "
                    f"{values[f'{name}_accuracy_mean']:.3f} (k=1 {values[f'{name}_accuracy_k01']:.3f})"
                )

    def replayed(self, step: int, values: Mapping[str, float]) -> None:
        # The tracker skips values that it already has.
        self._tracker.log(step, values)

    def quarantined(self, windows: Sequence[Mapping[str, Any]]) -> None:
        out = io.StringIO()
        writer = csv.DictWriter(out, QUARANTINE_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(windows)
        self._tracker.artifact("quarantine.csv", out.getvalue())

    def saved(self) -> None:
        # A resumed run starts from this checkpoint and does not repeat earlier steps: their records must not be lost.
        self._tracker.flush()
        if self._on_saved:
            self._on_saved()

    def close(self) -> None:
        if self._bar:
            self._bar.close()
