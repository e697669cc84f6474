"""What tells the features of one network from those of another."""

from __future__ import annotations

import dataclasses

from made_voices import TINY

from cpcscale.emotion.encoders.networks import encoder_digest, features_digest
from cpcscale.model.cpc import build
from cpcscale.model.encoder import EncoderConfig


def test_networks_of_equal_weights_that_differ_in_strides_share_no_cached_features():
    parts = EncoderConfig(channels=6, kernels=[10, 8, 4, 4], strides=[5, 4, 2, 4])
    one, other = (
        build(dataclasses.replace(TINY, encoder=dataclasses.replace(parts, strides=strides)), seed=0)
        for strides in ([5, 4, 2, 4], [5, 4, 4, 2])
    )
    assert encoder_digest(one) == encoder_digest(other)
    assert features_digest(one, "c", "corpus") != features_digest(other, "c", "corpus")
