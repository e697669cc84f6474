"""wav2vec 2.0, HuBERT and WavLM under recognisers: heard as the library has them, and treated as any other encoder."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_networks import CHANNELS, HIDDEN, LAYERS, put_network
from made_voices import put_corpus, recipe

from cpcscale import config
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.crossval import run_fold, start_fit
from cpcscale.emotion.encoders.huggingface import HFEncoder, open_hf
from cpcscale.emotion.encoders.layer import LayerFeatures
from cpcscale.emotion.encoders.networks import WindowEncoder, encoder_digest, features_digest
from cpcscale.emotion.heads.attention import AttentionHead, AttentionHeadConfig, EncoderWithHead
from cpcscale.emotion.inputs import prepare
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.experiments.encoders import absolute_checkpoint

CPU = torch.device("cpu")
# One frame is 400 samples, each further one 320.
SAMPLES = (16_000, 400, 719, 720, 9_000)
FRAMES = (49, 1, 1, 2, 27)
WIDTHS = {"c": (HIDDEN,), "z": (CHANNELS,), "both": (CHANNELS, HIDDEN), "mix": (HIDDEN,) * (LAYERS + 1)}


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[tuple[str, str], HFEncoder]:
    kinds = [("wav2vec2", "layer"), ("wav2vec2", "group"), ("hubert", "layer"), ("wavlm", "layer"), ("wavlm", "group")]
    folder = tmp_path_factory.mktemp("networks")
    return {(kind, norm): open_hf(put_network(folder / f"{kind}-{norm}", kind, norm=norm))[0] for kind, norm in kinds}


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    return put_network(tmp_path_factory.mktemp("network"))


def waves() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded with zeros to a multiple of half a second, as `collate` pads them."""
    generator = torch.Generator().manual_seed(0)
    wave_BS = torch.zeros(len(SAMPLES), 24_000)
    for row, count in enumerate(SAMPLES):
        wave_BS[row, :count] = 0.1 * torch.randn(count, generator=generator) + 0.05
    return wave_BS, torch.tensor(SAMPLES)


@pytest.mark.parametrize("layer", ["z", "c", "both", "mix"])
@pytest.mark.parametrize("wave_norm", ["corpus", "none"])
def test_a_padded_batch_equals_its_rows_one_by_one(networks, layer, wave_norm):
    wave_BS, samples_B = waves()
    for name, encoder in networks.items():
        hearing = LayerFeatures(encoder, layer, wave_norm)
        assert encoder.widths(layer) == WIDTHS[layer]
        with torch.inference_mode():
            together = hearing(wave_BS, samples_B)
            assert encoder.frames(samples_B).tolist() == list(FRAMES), name
            for row, count in enumerate(SAMPLES):
                alone = hearing(wave_BS[row : row + 1, :count], samples_B[row : row + 1])
                assert alone.shape == (1, FRAMES[row], sum(WIDTHS[layer]))
                torch.testing.assert_close(together[row, : FRAMES[row]], alone[0], atol=2e-5, rtol=1e-4, msg=str(name))


def test_the_layers_are_those_that_the_library_gives_of_input_scaled_by_its_extractor(url, networks):
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

    name = url.removeprefix("hf:")
    extractor, model = Wav2Vec2FeatureExtractor.from_pretrained(name), Wav2Vec2Model.from_pretrained(name).eval()
    wave_S = waves()[0][0, : SAMPLES[0]].numpy()
    given = extractor(wave_S, sampling_rate=16_000, return_tensors="pt").input_values
    with torch.inference_mode():
        theirs = model(given, output_hidden_states=True)
        z_BTC = model.feature_extractor(given).transpose(1, 2)
    states = [F.layer_norm(state, (HIDDEN,)) for state in (*theirs.hidden_states[:-1], theirs.last_hidden_state)]
    expected = {"z": z_BTC, "c": theirs.last_hidden_state, "both": torch.cat([z_BTC, theirs.last_hidden_state], 2)}
    expected["mix"] = torch.cat(states, dim=2)
    encoder, _ = open_hf(url)
    for layer, frames_BTC in expected.items():
        with torch.inference_mode():
            ours = LayerFeatures(encoder, layer)(torch.from_numpy(wave_S)[None], torch.tensor([len(wave_S)]))
        torch.testing.assert_close(ours, frames_BTC, atol=1e-5, rtol=1e-4)


def test_the_input_is_scaled_as_the_extractors_config_says_or_as_asked_for(tmp_path, url):
    plain, _ = open_hf(put_network(tmp_path / "plain", normalises=False))
    scaled, _ = open_hf(url)
    wave_BS, samples_B = waves()

    def heard(encoder: HFEncoder, wave_norm: str, gain: float = 1.0) -> torch.Tensor:
        with torch.inference_mode():
            return LayerFeatures(encoder, "z", wave_norm)(gain * wave_BS[:1], samples_B[:1])[0, : FRAMES[0]]

    torch.testing.assert_close(heard(scaled, "corpus"), heard(plain, "window"))
    torch.testing.assert_close(heard(plain, "corpus"), heard(scaled, "none"))
    torch.testing.assert_close(heard(scaled, "corpus"), heard(scaled, "corpus", gain=0.3), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(heard(plain, "corpus"), heard(scaled, "corpus"), atol=1e-3)


@pytest.mark.parametrize(("kind", "norm"), [("wav2vec2", "layer"), ("wavlm", "group")])
@pytest.mark.parametrize("layer", ["z", "c", "both", "mix"])
def test_every_parameter_that_requires_a_gradient_gets_one(networks, kind, norm, layer):
    encoder = copy.deepcopy(networks[kind, norm])
    mixed = WIDTHS[layer] if layer == "mix" else ()
    head = AttentionHead(AttentionHeadConfig(heads=2, hidden=8, dense=16), sum(WIDTHS[layer]), mixed)
    network = EncoderWithHead(encoder, head, layer).train()
    wave_BS, samples_B = waves()
    network(wave_BS, samples_B, torch.arange(len(SAMPLES))).sum().backward()
    for name, parameter in network.named_parameters():
        heard = layer != "z" or name.startswith(("recogniser", "encoder.network.feature_extractor"))
        assert (parameter.grad is not None) == parameter.requires_grad == heard, name


def test_in_training_a_batch_is_what_its_rows_are_so_micro_batches_change_nothing(networks):
    encoder = networks["wav2vec2", "layer"].train()
    wave_BS, samples_B = waves()
    first, again = (LayerFeatures(encoder)(wave_BS, samples_B) for _ in range(2))
    alone = LayerFeatures(encoder)(wave_BS[:1], samples_B[:1])
    encoder.eval()
    assert torch.equal(first, again)
    torch.testing.assert_close(first[:1, : FRAMES[0]], alone[:, : FRAMES[0]], atol=2e-5, rtol=1e-4)


def test_a_network_survives_a_copy_and_a_pickle(networks):
    for encoder in networks.values():
        for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):  # noqa: S301
            assert encoder_digest(other) == encoder_digest(encoder)
            wave_BS, samples_B = waves()
            with torch.inference_mode():
                there, here = (LayerFeatures(each)(wave_BS, samples_B) for each in (other, encoder))
            torch.testing.assert_close(there, here, atol=1e-6, rtol=1e-5)


def test_the_digests_differ_where_weights_settings_or_what_is_heard_do(tmp_path, networks, url):
    encoder, _ = open_hf(url)
    plain, _ = open_hf(put_network(tmp_path / "plain", normalises=False))
    other = encoder.untrained(1)
    assert len({encoder_digest(each) for each in (encoder, plain, other, *networks.values())}) == 7
    assert encoder_digest(open_hf(url)[0]) == encoder_digest(encoder)
    digests = [
        features_digest(encoder, layer, norm) for layer in ("z", "c", "both", "mix") for norm in ("corpus", "none")
    ]
    assert len(set(digests)) == 8
    assert all("transformers 5" in each for each in digests)


def test_untrained_networks_follow_from_their_seed_alone(networks):
    known = networks["hubert", "layer"]
    torch.manual_seed(3)
    first = encoder_digest(known.untrained(0))
    assert encoder_digest(known.untrained(0)) == first
    assert len({first, encoder_digest(known.untrained(1)), encoder_digest(known)}) == 3


@pytest.mark.parametrize(("system", "frozen"), [("precpc", True), ("precpc", False), ("random", True), ("raw", True)])
def test_every_system_takes_it_with_the_same_head_and_protocol(folder, url, system, frozen):
    settings = recipe(folder, system, url, epochs=1)
    settings.encoder.frozen, settings.encoder.layer = frozen, "mix"
    corpus = open_corpus(settings.corpus)
    prepared = prepare(settings, corpus)
    before = encoder_digest(prepared.encoder)
    result = run_fold(settings, prepared, 0)
    assert np.isfinite(result.guess_UP).all() and len(result.chosen["mix"]) == LAYERS + 1
    assert encoder_digest(prepared.encoder) == before
    _, fit = start_fit(settings, prepared, fold_splits(settings, corpus).splits[0])
    trained = system == "raw" or not frozen
    assert isinstance(fit.network, EncoderWithHead) == trained
    if trained:
        assert (encoder_digest(fit.network.encoder) == before) == (system == "precpc")
        start = encoder_digest(fit.network.encoder)
        list(fit)
        assert encoder_digest(fit.network.encoder) != start


def test_a_window_shorter_than_one_frame_repeats_itself(tmp_path, url):
    settings = recipe(put_corpus(tmp_path / "tones", speakers=3, each=1), "precpc", url)
    settings.corpus.max_s = 0.02
    prepared = prepare(settings, open_corpus(settings.corpus))
    assert all(len(window) == 320 for window in prepared.waves[0][:-1])
    assert all(x_TC.shape == (1, HIDDEN) for x_TC in prepared.inputs[0])


def test_frozen_features_are_those_of_each_utterance_alone_and_the_svr_head_takes_them(folder, url):
    settings = recipe(folder, "precpc", url)
    settings.head, settings.svm_search, settings.encoder.layer = "svr", False, "both"
    prepared = prepare(settings, open_corpus(settings.corpus))
    alone = WindowEncoder(prepared.encoder, "both", CPU)(prepared.waves[3])
    np.testing.assert_allclose(prepared.inputs[3][0], alone[0], atol=2e-5)
    assert np.isfinite(run_fold(settings, prepared, 0).guess_UP).all()


def test_a_local_folder_is_made_absolute_and_a_name_on_the_hub_stays(tmp_path, monkeypatch):
    (tmp_path / "network").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute_checkpoint("hf:network") == f"hf:{tmp_path}/network"
    assert absolute_checkpoint("hf:owner/name") == "hf:owner/name"
    assert absolute_checkpoint("network") == f"{tmp_path}/network"
    assert absolute_checkpoint("") == ""


def broken(url: str, folder: Path, name: str, change: dict | bytes | None) -> str:
    """A copy of a network one file of which is changed, garbled, or missing."""
    folder.mkdir()
    for file in Path(url.removeprefix("hf:")).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if change is None:
        (folder / name).unlink()
    elif isinstance(change, bytes):
        (folder / name).write_bytes(change)
    else:
        values = json.loads((folder / name).read_text()) | change
        (folder / name).write_text(json.dumps(values))
    return f"hf:{folder}"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", None, "cannot be loaded"),
        ("config.json", {"model_type": "bert"}, "a network of the kind bert: use one of wav2vec2, hubert, wavlm"),
        ("preprocessor_config.json", None, "preprocessor_config"),
        ("preprocessor_config.json", {"sampling_rate": 8000}, "wants audio at 8000 Hz"),
        ("model.safetensors", b"\x00" * 40, "cannot be loaded"),
        ("config.json", {"num_hidden_layers": 3}, "lacks 16 weights of the network"),
        ("config.json", {"hidden_size": 64}, "cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(url, tmp_path, name, change, message):
    with pytest.raises(UserError, match=message) as refusal:
        open_hf(broken(url, tmp_path / "broken", name, change))
    assert "\n" not in str(refusal.value)


def test_weights_that_would_have_to_be_unpickled_are_refused(url, tmp_path):
    other = broken(url, tmp_path / "pickled", "model.safetensors", None)
    torch.save(open_hf(url)[0].network.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"safetensors"):
        open_hf(other)


def test_without_the_extra_one_line_says_what_to_install(url, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'cpcscale\[hf\]'"):
        open_hf(url)


def test_minicpc_is_no_network_of_theirs():
    with pytest.raises(UserError, match="system=minicpc pretrains a CPC network"):
        config.build(EmotionRecipe, {"system": "minicpc", "encoder": {"checkpoint": "hf:owner/name"}})


def test_the_same_network_is_not_encoded_twice(folder, url, tmp_path, monkeypatch):
    settings = recipe(folder, "precpc", url)
    settings = replace(settings, audio_cache=replace(settings.audio_cache, path=str(tmp_path / "cache")))
    corpus = open_corpus(settings.corpus)
    first = [window for parts in prepare(settings, corpus).inputs for window in parts]
    monkeypatch.setattr(WindowEncoder, "__call__", lambda self, windows: pytest.fail("encoded again"))
    again = [window for parts in prepare(settings, corpus).inputs for window in parts]
    assert all(map(np.array_equal, first, again))
