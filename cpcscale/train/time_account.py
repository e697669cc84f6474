"""The time account of a rank's loop: seconds by phase, seconds hidden in the background, and device utilisation."""

from __future__ import annotations

import contextlib
import re
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

import torch

from cpcscale.train.device import Timeline

# The phases of the main thread in the order of a step; `unattributed` is time that no phase claims.
PHASES = (
    *("store", "decode", "copy", "forward", "objective", "backward", "allreduce", "optimiser"),
    *("logging", "validation", "checkpoint", "unattributed"),
)
# Work in the background, whose time is hidden behind these phases.
HIDDEN = ("store", "decode", "allreduce", "checkpoint")
# Phases that do not count as training time.
_NOT_TRAINING = ("validation", "checkpoint")

# Peak of dense matrix products in 1e12 operations a second, by GPU name: in 16 bits, and in fp32 without TF32.
_PEAK_TFLOPS = {
    "B200": (2250.0, 80.0),
    "GH200": (989.5, 67.0),
    "H200": (989.5, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.5, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
}


@dataclass(frozen=True)
class HiddenSeconds:
    """Seconds so far of background work: feed threads that read the store and that decode, the thread that saves
    checkpoints, the exchange of gradients, and the part of that exchange that the backward pass did not hide."""

    store_s: float = 0.0
    decode_s: float = 0.0
    checkpoint_s: float = 0.0
    allreduce_s: float = 0.0
    allreduce_exposed_s: float = 0.0

    def __sub__(self, before: HiddenSeconds) -> HiddenSeconds:
        return HiddenSeconds(*(getattr(self, each.name) - getattr(before, each.name) for each in fields(HiddenSeconds)))


@dataclass(frozen=True)
class TimeTotals:
    """An account of `wall_s` seconds: `exposed_s` (by PHASES) adds up to it, `hidden_s` (by HIDDEN) is background work.

    `audio_s` is the audio used in that time by all ranks, in seconds.
    """

    wall_s: float = 0.0
    audio_s: float = 0.0
    exposed_s: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    hidden_s: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(HIDDEN, 0.0))

    def __add__(self, other: TimeTotals) -> TimeTotals:
        return TimeTotals(
            self.wall_s + other.wall_s,
            self.audio_s + other.audio_s,
            {name: self.exposed_s[name] + other.exposed_s[name] for name in PHASES},
            {name: self.hidden_s[name] + other.hidden_s[name] for name in HIDDEN},
        )

    @property
    def training_s(self) -> float:
        """Wall time without validation and checkpoints."""
        return max(1e-9, self.wall_s - sum(self.exposed_s[name] for name in _NOT_TRAINING))

    def rates(self) -> dict[str, float]:
        """{audio_s_per_s, data_wait_share}: audio a second, and the share of waiting for data, of training time."""
        waited_s = self.exposed_s["store"] + self.exposed_s["decode"]
        return {"audio_s_per_s": self.audio_s / self.training_s, "data_wait_share": waited_s / self.training_s}

    def shares(self) -> dict[str, float]:
        """{time_PHASE, hidden_NAME} as shares of wall time; those of the phases add up to 1."""
        wall_s = max(1e-9, self.wall_s)
        exposed = {f"time_{name}": seconds / wall_s for name, seconds in self.exposed_s.items()}
        return exposed | {f"hidden_{name}": seconds / wall_s for name, seconds in self.hidden_s.items()}


class TimeAccount:
    """Keeps the time account of one rank. Its TrainStep marks its phases in the same `timeline`."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline, self._audio_s, self.total = timeline, 0.0, TimeTotals()
        self._before, self._beside, self._began = timeline.seconds(), HiddenSeconds(), time.perf_counter()
        timeline.mark("unattributed")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time in the block that no other mark claims as `name`: one of PHASES, or `wait` for the feed."""
        self._timeline.mark("unattributed")
        try:
            yield
        finally:
            self._timeline.mark(name)

    def count_audio(self, audio_s: float) -> None:
        """Adds seconds of audio that an update has used."""
        self._audio_s += audio_s

    def lap(self, beside: HiddenSeconds, phase: str) -> TimeTotals:
        """The account since the last lap, or since the start. Time up to now that has no mark counts as `phase`."""
        self._timeline.mark(phase)
        # In this order: `seconds` waits until a GPU has reached the mark.
        seconds = self._timeline.seconds()
        now = time.perf_counter()
        spent = {name: total - self._before.get(name, 0.0) for name, total in seconds.items()}
        lap = attribute_time(spent, beside - self._beside, now - self._began, self._audio_s)
        self._before, self._beside, self._began, self._audio_s = seconds, beside, now, 0.0
        self.total += lap
        return lap


def attribute_time(spent: Mapping[str, float], beside: HiddenSeconds, wall_s: float, audio_s: float) -> TimeTotals:
    """The account of `spent` seconds by mark and `beside` seconds of background work.

    Waiting for the feed is divided into `store` and `decode` in proportion to the time of the feed's threads. The time
    that the backward pass waited for other ranks is moved to `allreduce`.
    """
    exposed = {name: spent.get(name, 0.0) for name in PHASES}
    waited_s, fed_s = spent.get("wait", 0.0), beside.store_s + beside.decode_s
    exposed["store"] = waited_s * (beside.store_s / fed_s if fed_s > 0 else 0.0)
    exposed["decode"] = waited_s - exposed["store"]
    in_backward_s = min(exposed["backward"], beside.allreduce_exposed_s)
    exposed["backward"] -= in_backward_s
    exposed["allreduce"] += in_backward_s
    exposed["unattributed"] = wall_s - sum(exposed[name] for name in PHASES if name != "unattributed")
    hidden = {
        "store": max(0.0, beside.store_s - exposed["store"]),
        "decode": max(0.0, beside.decode_s - exposed["decode"]),
        "allreduce": max(0.0, beside.allreduce_s - beside.allreduce_exposed_s),
        "checkpoint": max(0.0, beside.checkpoint_s - exposed["checkpoint"]),
    }
    return TimeTotals(wall_s, audio_s, exposed, hidden)


def utilisation(device: torch.device, precision: str, flops_per_s: float) -> float | None:
    """Model FLOPs utilisation: `flops_per_s` of one device over its peak at this precision; None if the peak is not
    known, as for any CPU."""
    if device.type != "cuda":
        return None
    peak = peak_tflops(torch.cuda.get_device_name(device), precision)
    return flops_per_s / (1e12 * peak) if peak else None


def peak_tflops(name: str, precision: str) -> float | None:
    """The peak of dense matrix products of this GPU in TFLOP/s at a precision; None when it is not known."""
    for known, (half, single) in _PEAK_TFLOPS.items():
        # Whole words: an L40 is not an L4.
        if re.search(rf"\b{known}\b", name):
            return single if precision == "fp32" else half
    return None


def memory_peak_bytes(device: torch.device) -> int:
    """Peak memory so far in bytes: of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
