"""The figures of a bench as lines for a person."""

from __future__ import annotations

from typing import Any

_PLACES = {"memory": "shards on a RAM disk", "warm": "shards in the node's cache", "store": "object store, cold"}


def plan_lines(result: dict[str, Any]) -> list[str]:
    """What `cpcscale bench plan` prints."""
    return [
        f"{result['shards']:,} shards, {result['windows']:,} windows, {result['lanes']:,} lanes",
        f"  planned in {result['seconds']:.2f} s (from the shard table on disk), {result['peak_mib']:.0f} MiB at most",
        f"  position of a run {result['position_kib']:.1f} KiB, a later step reached in "
        f"{result['resume_seconds']:.2f} s",
        f"  windows of an epoch that no step has: {result['lost_share']:.0%}",
        f"  windows of {result['count_rows']:,} utterances counted in {result['count_seconds']:.2f} s, "
        f"{result['count_peak_mib']:.0f} MiB at most",
    ]


def feed_lines(result: dict[str, Any]) -> list[str]:
    """What `cpcscale bench feed` prints: the rates, the seconds of the decode threads, and the peers."""
    lines = [
        f"{result['codec']}, {result['window']}, {result['decode_threads']} decode thread(s), "
        f"{result['audio_s']:,.0f} s of audio a measurement, median of {result['runs']} interleaved",
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
    """What `cpcscale bench train` prints: the rates, the ratios, and the seconds of an update."""
    rates = result["audio_s_per_s"]
    lines = [
        f"{result['parameters']:,} parameters, {result['batch']} windows of {result['window_s']:g} s, draw "
        f"{result['draw']}, {result['threads']} thread(s), median of {result['runs']} in turns",
        f"  {'':40}{'audio s/s':>10}",
        f"  {'updates on a batch in memory':40}{rates['memory']:>10,.1f}",
        f"  {'updates on what the feed makes':40}{rates['feed']:>10,.1f}   waiting {result['data_wait_share']:.1%}",
        f"  {'updates with draw: each':40}{rates['each']:>10,.1f}",
    ]
    words = {
        "plain_matmul": "plain network, matrix-product loss",
        "plain_gathered": "plain network, negatives gathered",
    }
    for name, what in words.items():
        if f"{name}_audio_s_per_s" in result:
            ratio = result[f"ratio_to_{name}"]
            lines.append(f"  {what:40}{result[f'{name}_audio_s_per_s']:>10,.1f}   {ratio:.2f} times as fast in memory")
    lines += [
        f"  {'limit of the matrix products':40}{result['gemm_limit_audio_s_per_s']:>10,.1f}   "
        f"{result['ratio_to_gemm_limit']:.0%} of it in memory ({result['gemm_gflop_per_s']:,.0f} GFLOP/s)",
        f"  at most {result['peak_mib']:,} MiB in memory",
    ]
    for name, account in result["seconds"].items():
        spent = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in account.items())
        lines.append(f"  seconds of a measurement, {name}: {spent}")
    return lines
