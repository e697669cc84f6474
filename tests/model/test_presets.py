import dataclasses
from pathlib import Path

import pytest

from cpcscale import config
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.model.context import ContextConfig
from cpcscale.model.cpc import ModelConfig
from cpcscale.model.encoder import EncoderConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
SIZES = ["paper", "small", "base", "large"]


def open_keys(model: ModelConfig) -> list[str]:
    return [key for key, value in config.flat(model).items() if not value or value == "auto"]


@pytest.mark.parametrize("size", SIZES)
def test_a_built_config_is_wholly_explicit_and_makes_100_frames_a_second(size):
    model = config.build(ModelConfig, {"size": size})
    assert open_keys(model) == []
    assert model == ModelConfig(size=size)
    assert model.encoder.hop_samples == 160
    assert config.build(ModelConfig, dataclasses.asdict(model)) == model


@pytest.mark.parametrize("size", SIZES)
def test_over_log_mel_a_size_has_one_layer_and_all_else_that_it_had(size):
    of_size, mel = ModelConfig(size=size), config.build(ModelConfig, {"size": size, "encoder": {"kind": "logmel"}})
    layer = {"encoder.kind": "logmel", "encoder.kernels": [3], "encoder.strides": [1]}
    assert config.flat(mel) == config.flat(of_size) | layer
    assert (mel.encoder.hop_samples, mel.encoder.receptive_samples) == (160, 720)
    assert config.build(ModelConfig, config.identity(mel)) == mel
    assert {"kind", "bands"}.isdisjoint(config.identity(of_size)["encoder"]), "older digests stay"


def test_the_default_is_the_papers():
    assert ModelConfig() == ModelConfig(size="paper")
    expected = {
        "size": "paper",
        "encoder.channels": 128,
        "encoder.kernels": [10, 8, 8, 4],
        "encoder.strides": [5, 4, 4, 2],
        "encoder.norm": "none",
        "context.kind": "gru",
        "context.layers": 1,
        "context.width": 256,
        "predictor.kind": "linear",
        "predictor.steps": 12,
    }
    assert config.flat(ModelConfig()).items() >= expected.items()


def test_a_checkpoint_from_before_there_were_sizes_is_the_papers_network():
    old = {
        "encoder": {"channels": 64, "kernels": [10, 8, 8, 4], "strides": [5, 4, 4, 2]},
        "context": {"width": 128},
        "predictor": {"steps": 12},
    }
    expected = ModelConfig(encoder=EncoderConfig(channels=64), context=ContextConfig(width=128))
    assert config.build(ModelConfig, old) == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder.channels", 24),
        ("encoder.kernels", [12] * 4),
        ("encoder.strides", [2] * 4),
        ("encoder.norm", "group"),
        ("encoder.groups", 4),
        ("context.kind", "transformer"),
        ("context.layers", 3),
        ("context.width", 96),
        ("context.heads", 2),
        ("context.positions", "relative"),
        ("predictor.kind", "each"),
        ("predictor.steps", 5),
        ("predictor.heads", 2),
        ("predictor.positions", "relative"),
    ],
)
def test_an_explicit_key_wins_over_the_size_and_changes_no_other(size, key, value):
    layers = 5 if size != "paper" else 4
    value = value if not isinstance(value, list) else value[:1] * layers
    model = config.load(PretrainConfig, None, [f"model.size={size}", f"model.{key}={value}"]).model
    changed = {name for name, now in config.flat(model).items() if now != config.flat(ModelConfig(size=size))[name]}
    assert config.flat(model)[key] == value
    assert changed <= {key}


def test_the_parts_that_a_config_is_made_of_stay_as_they_were():
    encoder, context = EncoderConfig(channels=24), ContextConfig(layers=3)
    base = ModelConfig(size="base", encoder=encoder, context=context)
    assert (base.encoder.channels, base.encoder.norm) == (24, "channel")
    assert (base.context.layers, base.context.width) == (3, 512)
    assert (encoder, context) == (EncoderConfig(channels=24), ContextConfig(layers=3))


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="'huge'"):
        config.build(ModelConfig, {"size": "huge"})


def test_the_shipped_config_of_the_first_cpc_is_the_network_of_its_paper():
    run = config.load(PretrainConfig, str(CONFIGS / "cpc2018.yaml"))
    encoder, context = run.model.encoder, run.model.context
    assert (encoder.channels, encoder.kernels, encoder.strides) == (512, [10, 8, 4, 4, 4], [5, 4, 2, 2, 2])
    assert (encoder.norm, encoder.receptive_samples) == ("none", 465)
    assert (context.kind, context.layers, context.width) == ("gru", 1, 256)
    assert (run.model.predictor.kind, run.model.predictor.steps) == ("linear", 12)
    assert (run.window.samples, run.train.batch, run.train.steps) == (20_480, 64, 300_000)
