"""Publishes checkpoints of a run from one process, until another process takes the run over."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial

from cpcscale.errors import UserError
from cpcscale.runs import checkpoint_files
from cpcscale.runs.ledger import CheckpointEntry, Ledger, OvertakenError, RunState
from cpcscale.runs.probe_log import Probes


class Publisher:
    """Publishes the checkpoints of one process; keeps the newest `keep` and the best by `best_by`.

    In a probed run, checkpoints that are being probed or due are kept too. `probe_set` is the set it is probed on.
    """

    def __init__(
        self, ledger: Ledger, seen: RunState, step: int, *, keep: int, holder: str = "", best_by: str = "loss"
    ) -> None:
        """Continues from `step` of the state `seen`, for the driver that holds the run with the id `holder`.

        From here on no earlier process can publish. Raises OvertakenError when the state has changed since `seen` or
        another driver holds the run. Without a `holder` the run is taken from whoever holds it.
        """
        self._ledger, self._keep = ledger, keep
        probes = Probes(ledger.run_dir)
        self.probe_set = probes.probe_set()
        self._spare = partial(probes.select_kept, best_by=best_by, probe_set=self.probe_set)
        if holder and not seen.is_of(holder):
            raise self._overtaken()
        self._state = seen.started_from(step, holder, best_by)
        if not (ledger.advance(self._state) and ledger.is_head(self._state)):
            raise self._overtaken()

    def publish(self, step: int, heldout_loss: float | None, contents: Mapping[str, bytes]) -> str:
        """Publishes a checkpoint of `step`, then removes those that are not kept. Returns its folder.

        Raises OvertakenError once another process has taken the run over. A call that raises publishes nothing.
        """
        if self._ledger.highest() != self._state.number:
            raise self._overtaken()
        new = CheckpointEntry(checkpoint_files.folder_name(step, self._state.writer), step, heldout_loss)
        url = self._ledger.url(new)
        try:
            checkpoint_files.write(url, contents)
        except UserError:
            with contextlib.suppress(UserError):
                checkpoint_files.remove(url)
            raise
        state = self._state.published(new, self._keep, self._spare)
        if not self._ledger.advance(state):
            checkpoint_files.remove(url)
            raise self._overtaken()
        self._state = state
        if not self._ledger.is_head(state):
            # Another process took over right after this checkpoint was published: it owns the folder now.
            raise self._overtaken()
        self._ledger.remove_unlisted(state)
        return url

    def _overtaken(self) -> OvertakenError:
        return OvertakenError(self._ledger.run_dir, self._ledger.head())
