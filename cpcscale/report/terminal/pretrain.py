"""What `cpcscale pretrain` prints at its end, from the summary that is its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cpcscale import storage

# Smaller shares of the time are not printed.
_LEAST_SHARE = 0.001


def pretrain_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """The lines that show the summary of `experiments.pretrain.pretrain`."""
    yield (
        f"pretrained {summary['steps']} steps on {summary['audio_s'] / 3600:.2f} h of audio at "
        f"{summary['audio_s_per_s']:.0f} audio s/s ({summary['data_wait_share']:.1%} waiting for data)"
    )
    yield f"  time           {percentages(summary['time'])}"
    if any(share >= _LEAST_SHARE for share in summary["hidden"].values()):
        yield f"  in parallel    {percentages(summary['hidden'])}"
    scored: dict[str, Mapping[str, Any]] = {
        "training batch": summary,
        **{name: summary[name] for name in ("heldout", "unseen") if name in summary},
    }
    yield f"  InfoNCE accuracy (ties count as wrong; chance {summary['accuracy_chance']:.4f})"
    for name, scores in scored.items():
        by_step = [f"{scores[key]:.2f}" for key in sorted(scores) if key.startswith("accuracy_k")]
        detail = f"; k=1..{len(by_step)}: {' '.join(by_step)}" if by_step else ""
        yield f"  {name:14} mean {scores['accuracy_mean']:.3f}, loss {scores['loss']:.3f}{detail}"
    if "probe" in summary:
        yield from _probe_lines(summary["probe"])
    yield f"  checkpoint {storage.shown(summary['checkpoint'])}"
    yield f"  MLflow run {summary['run_id']}"


def _probe_lines(probe: Mapping[str, Any]) -> Iterator[str]:
    """The newest score, and the best by mean CCC if it is another one."""
    marks = "".join(f", {mark}" for mark in probe["marks"])
    yield f"  probe on {probe['corpus']} ({probe['split']}, {probe['speakers']} speakers{marks})"
    scores = probe["scores"]
    if scores:
        best = max(scores, key=lambda score: score["ccc"]["mean"])
        for score in (scores[-1], best) if best is not scores[-1] else (best,):
            by_name = ", ".join(f"{name} {value:.3f}" for name, value in score["ccc"].items() if name != "mean")
            word = "best" if score is best else "last"
            at = f"step {score['step']}, {score['audio_hours']:.2f} h"
            yield f"  {word:14} CCC mean {score['ccc']['mean']:.3f}, {by_name} ({at})"
    yield from (f"  the probe of step {failed['step']} failed: {failed['why']}" for failed in probe["failed"])


def percentages(by_name: Mapping[str, float]) -> str:
    """`backward 61.4%, forward 30.2%, ...`: the largest share first, without those below 0.1%."""
    largest = sorted(by_name.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.1%}" for name, share in largest if share >= _LEAST_SHARE)
