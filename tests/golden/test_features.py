"""Features are kept by the VERSION of what makes them, so features that change need a new number: these are frozen.

When a test fails here, either the change was not meant, or raise the VERSION that it names and write the new values
with `python -m pytest tests/golden --golden-write`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from cpcscale.emotion.audio import degraded as robustness
from cpcscale.emotion.audio import from_files, labelled_file
from cpcscale.emotion.corpora.corpus import Utterance
from cpcscale.emotion.encoders import layer as hearing
from cpcscale.emotion.encoders import networks
from cpcscale.emotion.encoders.layer import LayerFeatures
from cpcscale.handmade import functionals, mfcc, prosody
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.shards.packing.sources import AudioFile
from cpcscale.train.recipe import Recipe

GOLDEN = Path(__file__).with_name("features.json")


def wave() -> np.ndarray:
    """int16 [S]: a second of a voice that glides and stops, with a little noise, the same on every machine."""
    s = np.arange(16_000)
    phase = 2 * np.pi * (120 * s / 16_000 + 20 * (s / 16_000) ** 2)
    voice = sum(np.sin(k * phase) / k for k in range(1, 9)) * (s % 8_000 < 6_000)
    noise = ((s * 7_919 + s**2 * 104_729) % 2_003) / 2_003 - 0.5
    return (3_000 * voice + 60 * noise).astype(np.int16)


def waveform() -> np.ndarray:
    return wave().astype(np.float32) / 32_768


def layer(name: str, norm: str) -> np.ndarray:
    network = build(ModelConfig(), seed=0, offset=0.01, gain=8.0).eval()
    with torch.inference_mode():
        return LayerFeatures(network, name, norm)(torch.from_numpy(waveform())[None], torch.tensor([16_000]))[0].numpy()


def degraded(name: str) -> np.ndarray:
    return robustness.degrade(wave(), robustness.parse_condition(name), 0, "a")


def decoded(folder: Path) -> np.ndarray:
    stereo = np.stack([wave(), wave() // 2], axis=1)
    soundfile.write(folder / "a.flac", stereo, 44_100)
    one = Utterance(key="a", path=str(folder / "a.flac"), speaker="x", labels=(0.0, 0.0, 0.0))
    return np.asarray(labelled_file.read_file(one)[1])


def minicpc_weights(folder: Path) -> np.ndarray:
    soundfile.write(folder / "a.wav", np.tile(wave(), 4), 16_000)
    recipe = Recipe()
    recipe.window.kind, recipe.window.seconds = "tile", 1.28
    recipe.model.encoder.channels = recipe.model.context.width = 8
    recipe.objective.negatives = 4
    recipe.train.steps, recipe.train.batch, recipe.train.lanes, recipe.train.threads = 2, 2, 1, 1
    network = networks.pretrain_on([AudioFile(str(folder / "a.wav"), "a.wav", "x", "")], recipe, str(folder / "made"))
    return np.concatenate([tensor.numpy().ravel() for tensor in network.state_dict().values()])


MADE: dict[str, tuple[int, Callable[[Path], np.ndarray]]] = {
    "mfcc": (mfcc.VERSION, lambda _: mfcc.mfcc(waveform())),
    "logmel": (mfcc.VERSION, lambda _: mfcc.log_mel(waveform())),
    "functionals": (functionals.VERSION, lambda _: functionals.functionals(waveform())),
    "prosody pitch": (prosody.VERSION, lambda _: prosody.prosody(waveform(), "pitch")),
    **{
        f"{name} {norm}": (hearing.VERSION, lambda _, name=name, norm=norm: layer(name, norm))
        for name, norm in (("z", "corpus"), ("c", "corpus"), ("both", "window"), ("c", "none"))
    },
    **{
        name: (robustness.VERSION, lambda _, name=name: degraded(name))
        for name in ("noise10", "reverb", "telephone", "gain+12")
    },
    "decoded": (from_files.VERSION, decoded),
    "minicpc": (networks.MINICPC_VERSION, minicpc_weights),
}


def frozen(array: np.ndarray) -> list[float]:
    """24 values from all over the array, then its mean, mean size and deviation."""
    flat = array.astype(np.float64).ravel()
    places = np.linspace(0, len(flat) - 1, 24).astype(int)
    values = [*flat[places], flat.mean(), np.abs(flat).mean(), flat.std()]
    return [float(f"{value:.6g}") for value in values]


@pytest.mark.parametrize("name", MADE)
def test_features_change_only_with_their_version(name, tmp_path, request):
    version, make = MADE[name]
    array = make(tmp_path)
    found = {"version": version, "shape": list(array.shape), "values": frozen(array)}
    if request.config.getoption("--golden-write"):
        golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps(golden | {name: found}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())[name]
    assert (found["version"], found["shape"]) == (golden["version"], golden["shape"])
    # Other processors round otherwise.
    scale = max(map(abs, golden["values"]))
    assert found["values"] == pytest.approx(golden["values"], rel=1e-4, abs=1e-4 * scale)
