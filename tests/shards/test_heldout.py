"""Promises of what is held out: it is in no training shard, and does not move when other things change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trees import corpus, members, noise, write_tree

from cpcscale.shards.pack import PackConfig, pack

SPEC = PackConfig(shard_mb=0.12, heldout_share=0.2, heldout_by="utterance", unseen_groups=["s3"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus") / "audio")


def test_held_out_utterances_are_in_no_training_shard(source, tmp_path):
    by_split = pack(str(source), str(tmp_path), SPEC).splits
    keys = {split: set(index.utterances["key"].to_pylist()) for split, index in by_split.items()}
    waves = {split: set(index.utterances["checksum"].to_pylist()) for split, index in by_split.items()}
    assert sum(map(len, keys.values())) == len(set.union(*keys.values())) == 24
    assert sum(map(len, waves.values())) == len(set.union(*waves.values())) == 24
    assert set(by_split["unseen"].utterances["group"].to_pylist()) == {"s3"}
    assert "s3" not in by_split["train"].utterances["group"].to_pylist()
    heldout = by_split["heldout"].utterances["group"].to_pylist()
    assert sorted(heldout) == ["s0", "s1", "s2"]


def test_the_held_out_share_of_a_speaker_does_not_change_with_other_speakers(tmp_path):
    def heldout(speakers: int, **changes: Any) -> set[str]:
        root = tmp_path / f"audio{speakers}"
        if not root.exists():
            corpus(root, speakers=speakers)
        target = tmp_path / f"shards{speakers}-{changes}"
        packed = pack(str(root), str(target), replace(SPEC, unseen_groups=[], **changes))
        return {key for key, split in members(packed).items() if split == "heldout"}

    few, many = heldout(3), heldout(7)
    assert len(few) == 3
    assert few == {key for key in many if key[:2] in ("s0", "s1", "s2")}
    assert heldout(3, codec="wav", shard_mb=1.0) == few
    assert heldout(3, seed=1) != few


def test_held_out_by_group_takes_whole_groups(source, tmp_path):
    packed = pack(str(source), str(tmp_path), replace(SPEC, heldout_by="group", heldout_share=0.34))
    groups = {split: set(index.utterances["group"].to_pylist()) for split, index in packed.splits.items()}
    assert {split: len(names) for split, names in groups.items()} == {"train": 2, "heldout": 1, "unseen": 1}
    assert len(members(packed)) == 24


def test_a_small_share_holds_out_at_least_one_of_each_speaker(source, tmp_path):
    packed = pack(str(source), str(tmp_path), replace(SPEC, heldout_share=0.01))
    assert sorted(packed.splits["heldout"].utterances["group"].to_pylist()) == ["s0", "s1", "s2"]


def test_a_speaker_of_one_utterance_stays_in_training(tmp_path):
    root = write_tree(tmp_path / "audio", {"a.wav": noise(1, 1), "b.wav": noise(1, 2)}, {"a.wav": "x", "b.wav": "y"})
    packed = pack(str(root), str(tmp_path / "shards"), PackConfig(heldout_share=0.2, heldout_by="utterance"))
    assert set(members(packed).values()) == {"train"}
