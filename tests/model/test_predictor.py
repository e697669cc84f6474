import pytest
import torch

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.model.predictor import Predictor

STEPS, WIDTH, CHANNELS = 3, 8, 6


def predictor(kind: str) -> Predictor:
    parts = {"encoder": {"channels": CHANNELS}, "context": {"width": WIDTH}}
    return build(
        config.build(ModelConfig, parts | {"predictor": {"kind": kind, "steps": STEPS, "heads": 2}}), 0
    ).predictor


@pytest.mark.parametrize(("kind", "layers"), [("linear", 0), ("shared", 1), ("each", STEPS)])
def test_step_k_is_predicted_by_its_own_map_of_what_its_layer_makes_of_c(kind, layers):
    made = predictor(kind)
    assert len(made.layers) == layers
    c_BTD = torch.randn(2, 9, WIDTH)
    predictions_BTKC = made(c_BTD)
    for k, w_CD in enumerate(made.maps.weight.view(STEPS, CHANNELS, WIDTH)):
        behind = made.layers[k if kind == "each" else 0](c_BTD) if layers else c_BTD
        torch.testing.assert_close(predictions_BTKC[:, :, k], behind @ w_CD.T)


@pytest.mark.parametrize("kind", ["linear", "shared", "each"])
def test_one_step_ahead_is_enough(kind):
    parts = {"predictor": {"kind": kind, "steps": 1}}
    assert build(config.build(ModelConfig, parts), 0).predictor(torch.zeros(1, 4, 256)).shape == (1, 4, 1, 128)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "model.predictor.steps=0 is below 1"),
        ({"heads": -2}, "model.predictor.heads=-2 is below 0"),
        ({"kind": "shared", "heads": 3}, "model.predictor.heads=3 does not split model.context.width=256"),
        ({"kind": "each", "heads": 256}, "even width, which rotary positions need: use model.predictor.heads=128"),
        ({"kind": "mlp"}, "'mlp'"),
    ],
)
def test_a_predictor_that_cannot_be_is_refused_with_the_way_out(values, words):
    with pytest.raises(UserError, match=words):
        config.build(ModelConfig, {"predictor": values})


def test_heads_of_a_linear_predictor_do_not_matter():
    config.build(ModelConfig, {"predictor": {"kind": "linear", "heads": 3}})
