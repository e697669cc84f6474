"""What `cpcscale checkpoint` prints, from the same values as its JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from cpcscale import config, storage
from cpcscale.progress import duration


def list_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """The lines of `checkpoint ls`, from `runs.inspect.list_checkpoints`."""
    rows = values["checkpoints"]
    width = max(len(row["folder"]) for row in rows)
    probed = any(row["probe"] for row in rows)
    ccc = f" {'probe CCC':>9}" if probed else ""
    yield f"{'checkpoint':{width}} {'step':>9} {'audio h':>9} {'held-out':>9}{ccc} {'MB':>9}  age"
    for row in rows:
        cells = (
            _figure(row["audio_hours"], "{:,.2f}"),
            _figure(row["heldout_loss"], "{:.3f}"),
            *([row["probe"] if row["probe_ccc"] is None else f"{row['probe_ccc']:.3f}"] if probed else []),
            _figure(row["bytes"] and row["bytes"] / 1e6, "{:,.1f}"),
        )
        age = "" if row["age_s"] is None else duration(row["age_s"])
        marks = [name for name in ("newest", "best") if row[name]]
        if row["why"]:
            marks.append(f"torn: {row['why']}" if row["published"] else row["why"])
        line = f"{row['folder']:{width}} {row['step']:>9,} " + " ".join(f"{cell or '':>9}" for cell in cells)
        yield f"{line}  {age:10} {', '.join(marks)}".rstrip()


def verify_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """The lines of `checkpoint verify`, from `runs.inspect.verify_checkpoints`; damaged checkpoints come last."""
    torn = {folder: wrong for folder, wrong in values["checkpoints"].items() if wrong}
    yield (
        f"verified {len(values['checkpoints'])} checkpoint(s) at {storage.shown(values['path'])}, every byte: "
        f"{f'{len(torn)} torn' if torn else 'all whole'}"
    )
    yield from (f"  {folder}: {', '.join(wrong)}" for folder, wrong in torn.items())


def show_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """The lines of `checkpoint show`, from `runs.inspect.describe_checkpoint`."""
    position = values["position"]
    hours = position["audio_s"] / 3600
    yield f"{storage.shown(values['checkpoint'])}: step {position['step']:,}, {hours:,.2f} h of audio"
    yield f"  fingerprint  {position['fingerprint']}"
    yield f"  config       {values['config_hash']}"
    counts = {
        "updates skipped": position["skipped"],
        "not finite": position["nonfinite"],
        "bad windows": position["bad"],
    }
    yield "  position     " + ", ".join(
        [f"{len(position['cursors'])} lanes", *(f"{count:,} {name}" for name, count in counts.items())]
    )
    metrics = {name: value for name, value in position["metrics"].items() if not name.rpartition("_k")[2].isdigit()}
    yield "  metrics      " + (
        ", ".join(f"{name}={value:.4g}" for name, value in metrics.items()) or "none logged at this step"
    )
    yield "  identity     keys that may not change when the run is resumed"
    yield from (f"    {key}={value}" for key, value in config.leaves(position["identity"]))
    for part, tensors in values["tensors"].items():
        numbers = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
        yield f"  {part:12} {len(tensors)} tensors, {numbers:,} numbers"
        yield from (f"    {name}  {tensor['dtype']} {tensor['shape']}" for name, tensor in tensors.items())


def acoustics_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """The lines of `checkpoint acoustics`, from `experiments.acoustics.acoustics`."""
    networks = [("untrained", values["random"]), *((f"step {row['step']:,}", row) for row in values["checkpoints"])]
    width = max(len(name) for name, _ in networks)
    columns = ("level", "pitch", "rate", "speaker")
    yield f"{values['utterances']} utterances of {values['groups']} speakers in {storage.shown(values['shards'])}"
    yield f"{'network':{width}}  layer" + "".join(f" {name:>8}" for name in columns)
    for name, found in networks:
        for layer in ("z", "c"):
            cells = (_figure(found[layer].get(column), "{:.3f}") or "-" for column in columns)
            yield f"{name if layer == 'z' else '':{width}}  {layer:5}" + "".join(f" {cell:>8}" for cell in cells)
    yield "level, pitch and rate: CCC of a ridge regression on mean and deviation over time, for speakers not fitted to"
    if values["chance"] is None:
        yield "speaker: the index knows no two speakers of one language with two recordings each"
    else:
        told = f"{values['speakers']} speakers, told from others of their language in other recordings"
        yield f"speaker: share found of {told} (chance {values['chance']:.3f})"
    if values["added"] is not None:
        yield f"MLflow: {values['added']} values added to the run, beside its loss"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
