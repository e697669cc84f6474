"""What `cpcscale bench scale` prints."""

from __future__ import annotations

from typing import Any


def scale_lines(result: dict[str, Any]) -> list[str]:
    """The memory of each process, then the time of a step."""
    rank, many, feeders, actors = (result[name] for name in ("rank", "rank_of_many", "feeders", "actors"))
    position, step = result["position"], result["step"]
    lines = [
        f"{result['shards']:,} shards, {result['utterances']:,} utterances, {result['ranks']:,} ranks",
        f"  index opened in {rank['open_s']:.2f} s, an epoch put in order in {rank['epoch_s']:.2f} s; a run's position "
        f"{position['bytes'] / 1024:.1f} KiB, {position['bytes_per_lane']:.1f} bytes a lane",
        f"  {'':40}{'private MiB':>13}{'bytes a shard':>15}",
        _held("rank that decodes", rank["private_mib"], rank["bytes_per_shard"]["private"]),
        _held("  at most, while it opens the index", rank["peak_mib"], rank["bytes_per_shard"]["peak"]),
    ]
    words = {
        "rank": "rank with feeder actors",
        "feeder": "feeder actor",
        "store": "object store, for each rank and node",
        "driver": "driver",
        "mailbox": "mailbox actor",
    }
    lines += [_held(what, actors[f"{name}_mib"], actors["bytes_per_shard"][name]) for name, what in words.items()]
    parts = ("order", "draft", "coming")
    lines.append(
        f"  {'microseconds of a step (the worst)':40}" + "".join(f"{part:>18}" for part in parts) + f"{'feed':>10}"
    )
    for each in (rank, many):
        spent = [f"{middle:,.0f} ({worst:,.0f})" for middle, worst in (each[f"{part}_us"] for part in parts)]
        lanes = f"  rank of {each['lanes']} lane{'s' * (each['lanes'] > 1)}"
        lines.append(f"{lanes:42}" + "".join(f"{cell:>18}" for cell in spent) + f"{each['feed_us']:>10,.0f}")
    return [
        *lines,
        "    order: find the rows of a step; draft: ask for their members; coming: name the next shards; feed: a step",
        f"  rows of all {result['ranks']:,} ranks: {step['us_per_rank']:.0f} us a rank and step, {step['wrong']} wrong",
        f"  {result['ranks']:,} feeders in one process: first batches in {feeders['first_s']:.1f} s, then "
        f"{feeders['batch_us']:,.0f} us a batch, {feeders['kib_each']:,.0f} KiB each, {feeders['wrong']} rows wrong",
        f"  a batch through the object store in {actors['step_us']:,.0f} us, the first after "
        f"{actors['first_batch_s']:.1f} s; a message to the mailbox in {actors['put_us']:,.0f} us, "
        f"{actors['message_bytes']:,} bytes while nobody takes it",
    ]


def _held(what: str, mib: float, bytes_per_shard: float) -> str:
    return f"  {what:40}{mib:>13,.0f}{bytes_per_shard:>15,.0f}"
