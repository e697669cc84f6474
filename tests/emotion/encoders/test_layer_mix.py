"""A learnt mix of an encoder's layers: what it computes, that it learns, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_voices import put_checkpoint, put_corpus, recipe

from cpcscale import config
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.crossval import run_fold, start_fit
from cpcscale.emotion.heads.attention import AttentionHead, AttentionHeadConfig, EncoderWithHead, LayerMix, learnt_mix
from cpcscale.emotion.inputs import prepare
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.model.context import ContextConfig
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.model.encoder import EncoderConfig

FRAMES = (17, 4, 1, 9)


def mixing(widths: tuple[int, ...]) -> LayerMix:
    torch.manual_seed(0)
    mix = LayerMix(widths).double()
    with torch.no_grad():
        mix.weight_L.copy_(torch.randn(len(widths)))
        mix.scale.fill_(1.7)
    return mix


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_shares_add_up_to_1_and_a_mix_is_as_wide_as_its_widest_layer(widths):
    mix = mixing(tuple(widths))
    assert mix.share_L.sum().item() == pytest.approx(1) and (mix.share_L > 0).all()
    assert mix(torch.randn(2, 3, sum(widths), dtype=torch.float64)).shape == (2, 3, max(widths))


def test_layers_of_one_width_are_summed_by_their_shares():
    mix = mixing((4, 4, 4))
    x_BTC = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = 1.7 * sum(share * x_BTC[..., 4 * n : 4 * n + 4] for n, share in enumerate(mix.share_L))
    torch.testing.assert_close(mix(x_BTC), expected)


@given(factor=st.floats(0.1, 10))
def test_how_much_of_a_layer_passes_is_said_by_its_share_alone(factor):
    mix = mixing((3, 5))
    x_BTC = torch.randn(2, 4, 8, dtype=torch.float64)
    before = mix(x_BTC)
    with torch.no_grad():
        for rows in mix.maps:
            rows *= factor
    torch.testing.assert_close(mix(x_BTC), before)


def test_a_padded_batch_equals_its_rows_one_by_one():
    torch.manual_seed(0)
    network = AttentionHead(AttentionHeadConfig(heads=2, hidden=8, dense=16, pool_frames=4), 10, (4, 6)).double().eval()
    network.standardise(torch.randn(10), torch.rand(10) + 0.5)
    x_BTC = 1e3 * torch.randn(len(FRAMES), max(FRAMES), 10, dtype=torch.float64)
    together = network(x_BTC, torch.tensor(FRAMES))
    for row, frames in enumerate(FRAMES):
        alone = network(x_BTC[row : row + 1, :frames], torch.tensor([frames]))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=1e-10)


def test_the_layer_that_carries_the_label_gets_the_larger_share():
    torch.manual_seed(0)
    network = AttentionHead(AttentionHeadConfig(heads=2, hidden=16, dense=16, dropout=0.0), 8, (4, 4))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    frames_B, key_B = torch.full((16,), 6), torch.arange(16)
    for _ in range(150):
        x_BTC = torch.randn(16, 6, 8)
        loss = (network(x_BTC, frames_B, key_B) - x_BTC[:, :, 4:7].mean(dim=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first, second = learnt_mix(network)
    assert second > 0.6 > first


@pytest.mark.parametrize("trained", [True, False])
def test_every_parameter_that_requires_a_gradient_gets_one(trained):
    encoder = build(ModelConfig(encoder=EncoderConfig(channels=4), context=ContextConfig(width=6)), seed=0)
    network = EncoderWithHead(
        encoder, AttentionHead(AttentionHeadConfig(heads=2, hidden=8, dense=16), 10, (4, 6)), "mix"
    )
    encoder.requires_grad_(trained)
    network(torch.randn(2, 1600), torch.tensor([1600, 800]), torch.arange(2)).sum().backward()
    for name, parameter in network.recogniser.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("system", ["random", "precpc"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_shares_learnt_stand_in_what_each_fold_has_chosen(tmp_path, system, frozen):
    folder, checkpoint = put_corpus(tmp_path / "tones"), put_checkpoint(tmp_path / "run")
    settings = recipe(folder, system, checkpoint)
    settings.encoder.layer, settings.encoder.frozen = "mix", frozen
    corpus = open_corpus(settings.corpus)
    prepared = prepare(settings, corpus)
    _, fit = start_fit(settings, prepared, fold_splits(settings, corpus).splits[0])
    assert learnt_mix(fit.network) == [0.5, 0.5]
    chosen = run_fold(settings, prepared, 0).chosen
    assert sum(chosen["mix"]) == pytest.approx(1, abs=1e-5) and not np.allclose(chosen["mix"], 0.5, atol=1e-5)
    settings.encoder.layer = "both"
    assert "mix" not in run_fold(settings, prepare(settings, corpus), 0).chosen


def test_a_head_that_learns_no_mix_refuses_one():
    for change, key in (({"head": "svr"}, "head=svr"), ({"classify": True}, "classify=true")):
        for system in ("random", "precpc", "minicpc"):
            with pytest.raises(UserError, match=rf"encoder.layer=mix .* {key} .* use encoder.layer=both"):
                config.build(EmotionRecipe, {"system": system, "encoder": {"layer": "mix"}, **change})
    # Systems without an encoder do not look at its keys, so that one config is of all systems.
    config.build(EmotionRecipe, {"system": "functionals", "encoder": {"layer": "mix"}, "head": "svr"})
