"""What `cpcscale bench feed`, `train` and `plan` print."""

from __future__ import annotations

from typing import Any

_PLACES = {"memory": "shards on a RAM disk", "warm": "shards in the node's cache", "store": "object store, cold"}


def plan_lines(result: dict[str, Any]) -> list[str]:
    """What `cpcscale bench plan` prints."""
    return [
        f"{result['shards']:,} shards, {result['windows']:,} windows, {result['lanes']:,} lanes",
        f"  planned in {result['seconds']:.2f} s (from the shard table on disk), {result['peak_mib']:.0f} MiB at most",
        f"  position of a run: {result['position_kib']:.1f} KiB; a later step is reached in "
        f"{result['resume_seconds']:.2f} s",
        f"  windows of an epoch that are in no step: {result['lost_share']:.0%}",
        f"  windows of {result['count_rows']:,} utterances counted in {result['count_seconds']:.2f} s, "
        f"{result['count_peak_mib']:.0f} MiB at most",
    ]


def feed_lines(result: dict[str, Any]) -> list[str]:
    """What `cpcscale bench feed` prints: the rates, the seconds of the decode threads, and the peers."""
    lines = [
        f"{result['codec']}, {result['window']}, {result['decode_threads']} decode thread(s), "
        f"{result['audio_s']:,.0f} s of audio a measurement, median of {result['runs']} interleaved runs",
        f"  {'':28}{'audio s/s':>10}{'of decoder':>12}{'first batch':>13}{'a core':>10}",
        f"  {'decoder alone, from memory':28}{result['decoder_audio_s_per_s']:>10,.0f}{'':>12}",
    ]
    for name, words in _PLACES.items():
        lines.append(
            f"  {words:28}{result['audio_s_per_s'][name]:>10,.0f}{result[f'ratio_{name}']:>12.1%}"
            f"{result['first_batch_s'][name]:>11.2f} s{result['per_core_audio_s_per_s'][name]:>10,.0f}"
        )
    lines += [
        f"  raw ranged reads of the store: {result['raw_ranged_mb_per_s']:,.0f} MB/s, "
        f"{result['raw_ranged_audio_s_per_s']:,.0f} audio s/s (cold feed: {result['ratio_store_to_raw']:.1%} of it); "
        f"bytes fetched over bytes used: {result['fetched_over_used']:.2f}",
        f"  {'seconds of decode threads':28}" + "".join(f"{phase:>10}" for phase in result["seconds"]["memory"]),
    ]
    for name, words in _PLACES.items():
        lines.append(f"  {words:28}" + "".join(f"{spent:>10.3f}" for spent in result["seconds"][name].values()))
    for name, rate in result["peers"].items():
        ratio = result["ratio_to_peers"][name]
        lines.append(f"  {name:28}{rate:>10,.0f}   the feed from a warm cache is {ratio:.2f} times as fast")
    return lines


def train_lines(result: dict[str, Any]) -> list[str]:
    """What `cpcscale bench train` prints: the rates, what they are measured against, and the seconds of updates."""
    rates = result["audio_s_per_s"]
    lines = [
        f"{result['parameters']:,} parameters, {result['batch']} windows of {result['window_s']:g} s, draw "
        f"{result['draw']}, {result['threads']} thread(s), median of {result['runs']} runs in turns",
        f"  {'':40}{'audio s/s':>10}",
        _rate("updates on a batch in memory", rates["memory"], f"at most {result['peak_mib']:,} MiB"),
        _rate("updates on what the feed makes", rates["feed"], f"waiting {result['data_wait_share']:.1%}"),
        *_ranks_lines(result["ranks"]),
        _rate("updates with draw: each", rates["each"]),
    ]
    words = {
        "plain_matmul": "plain network, matrix-product loss",
        "plain_gathered": "plain network, negatives gathered",
    }
    for name, what in words.items():
        if f"{name}_audio_s_per_s" in result:
            ratio = result[f"ratio_to_{name}"]
            lines.append(_rate(what, result[f"{name}_audio_s_per_s"], f"{ratio:.2f} times as fast in memory"))
    of_limit = f"{result['ratio_to_gemm_limit']:.0%} of it in memory ({result['gemm_gflop_per_s']:,.0f} GFLOP/s)"
    lines.append(_rate("limit of the matrix products", result["gemm_limit_audio_s_per_s"], of_limit))
    if "null_loop_ratio" in result:
        of_feed = f"{result['null_loop_ratio']:.0%} of the feed alone ({result['feed_alone_audio_s_per_s']:,.1f})"
        lines.append(_rate("the loop without its network", result["null_loop_audio_s_per_s"], of_feed))
    return [*lines, _time_account_line(result), *_seconds_lines(result)]


def _rate(what: str, audio_s_per_s: float, words: str = "") -> str:
    return f"  {what:40}{audio_s_per_s:>10,.1f}   {words}".rstrip()


def _ranks_lines(ranks: dict[str, Any]) -> list[str]:
    lines = []
    for world, found in ranks.items():
        memory, feed = (f"{found['ratio_to_one'][place]:.2f} times one rank" for place in ("memory", "feed"))
        lines += [
            _rate(
                f"  {world} ranks, in memory", found["memory"], f"{memory}, at most {found['peak_mib']:,} MiB in all"
            ),
            _rate(f"  {world} ranks, on the feed", found["feed"], f"{feed}, waiting {found['data_wait_share']:.1%}"),
        ]
    return lines


def _time_account_line(result: dict[str, Any]) -> str:
    shares = [f"{_small(result['meter_share'])} of an update in memory"]
    if "null_meter_share" in result:
        shares.append(f"{_small(result['null_meter_share'])} of one without its network")
    marks = f"{result['meter_marks']} marks an update, {result['meter_mark_us']:.2f} us each"
    return f"  the time account's {marks}, take {', '.join(shares)}"


def _small(share: float) -> str:
    return "under 0.001%" if share < 1e-5 else f"{share:.3%}"


def _seconds_lines(result: dict[str, Any]) -> list[str]:
    """A table of the seconds by phase, and a line with the seconds of work that ran in parallel to them."""
    seconds, hidden = dict(result["seconds"]), dict(result["hidden"])
    for world, found in result["ranks"].items():
        seconds |= {f"{world} ranks, {place}": spent for place, spent in found["seconds"].items()}
        hidden |= {f"{world} ranks, {place}": spent for place, spent in found["hidden"].items()}
    # Phases that would print as 0.000 everywhere are left out; unattributed stays: it shows what is not measured.
    most = {name: max(abs(spent[name]) for spent in seconds.values()) for name in seconds["memory"]}
    shown = [name for name in most if most[name] >= 0.0005 or name == "unattributed"]
    widths = {name: max(8, len(name) + 2) for name in shown}
    lines = [f"  {'seconds':18}" + "".join(f"{name:>{width}}" for name, width in widths.items())]
    for place, spent in seconds.items():
        cells = "".join(f"{spent[name]:>{width}.3f}" for name, width in widths.items())
        lines.append(f"  {place.replace('_', ' '):18}{cells}")
    parallel = {
        place: {name: spent for name, spent in each.items() if spent >= 0.0005} for place, each in hidden.items()
    }
    words = [
        f"{place.replace('_', ' ')}: " + ", ".join(f"{name} {spent:.3f}" for name, spent in each.items())
        for place, each in parallel.items()
        if each
    ]
    return lines + ([f"  in parallel       {'; '.join(words)}"] if words else [])
