"""The metrics of a run: rates, time account, memory and traffic since the last log line, and the final summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cpcscale.storage import TrafficCounts
from cpcscale.train.checkpoint import RunPosition
from cpcscale.train.ranks import Ranks
from cpcscale.train.time_account import TimeTotals, memory_peak_bytes, utilisation


def log_metrics(
    lap: TimeTotals, traffic: TrafficCounts, flops_per_audio_s: float, precision: str, ranks: Ranks
) -> dict[str, float]:
    """Means over ranks of `TimeTotals.rates` and `TimeTotals.shares`, and the largest `memory_peak_mib` of any rank.

    Adds `mfu` (model FLOPs utilisation) if the device's peak is known: the model's FLOPs (`flops_per_audio_s` forward,
    3 times that to train) over the peak. Adds `store_*`, the traffic of all ranks and their feeders since the start, if
    there was any. All ranks call this together and get the same values.
    """
    own = lap.rates() | lap.shares()
    moved = [traffic.bytes_read, traffic.bytes_written, traffic.requests, traffic.retries]
    totals = ranks.sum(torch.tensor([*own.values(), *moved], dtype=torch.float64)).tolist()
    values = {name: total / ranks.world for name, total in zip(own, totals, strict=False)}
    peak = ranks.max(torch.tensor(memory_peak_bytes(ranks.device), dtype=torch.float64))
    values["memory_peak_mib"] = float(peak) / 2**20
    mfu = utilisation(ranks.device, precision, 3 * flops_per_audio_s * values["audio_s_per_s"] / ranks.world)
    if mfu is not None:
        values["mfu"] = mfu
    read, written, requests, retries = totals[len(own) :]
    if requests:
        values |= {"store_read_mb": read / 1e6, "store_written_mb": written / 1e6}
        values |= {"store_requests": requests, "store_retries": retries}
    return values


def feed_seconds(by_name: Mapping[str, float]) -> tuple[float, float]:
    """(seconds that a feed's threads spent reading the store, seconds spent verifying, decoding, measuring and
    collating)."""
    own = ("verify", "decode", "measure", "collate")
    return by_name.get("fetch", 0.0), sum(by_name.get(name, 0.0) for name in own)


def summary(
    position: RunPosition, total: TimeTotals, chance: float, checkpoint: str | None, validations: Sequence[str]
) -> dict[str, Any]:
    """The result of a finished run: steps, loss, accuracy_mean, accuracy_chance, audio_s, audio_s_per_s,
    data_wait_share, time and hidden (`TimeTotals.shares` of this rank), memory_peak_mib, mfu, learning_rate (of the
    last update), checkpoint, skipped_updates, bad_windows, and the scores of each validation set."""
    metrics = position.metrics
    # A run that was already finished made no update: its rates are those in the checkpoint.
    rates = {**total.rates(), **total.shares()} if total.audio_s else metrics
    return {
        "steps": position.step,
        "loss": metrics["loss"],
        "accuracy_mean": metrics["accuracy_mean"],
        "accuracy_chance": chance,
        "audio_s": position.audio_s,
        "audio_s_per_s": rates["audio_s_per_s"],
        "data_wait_share": rates["data_wait_share"],
        "time": _grouped(rates, "time_"),
        "hidden": _grouped(rates, "hidden_"),
        "memory_peak_mib": metrics.get("memory_peak_mib"),
        "mfu": metrics.get("mfu"),
        "learning_rate": metrics.get("learning_rate"),
        "checkpoint": checkpoint,
        "skipped_updates": position.skipped,
        "bad_windows": position.bad,
        **{name: _grouped(metrics, f"{name}_") for name in validations},
    }


def _grouped(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
