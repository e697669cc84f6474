import pytest
import torch

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.model.cpc import ModelConfig, build


def context(**values):
    return build(config.build(ModelConfig, {"encoder": {"channels": 6}, "context": {"width": 8, **values}}), 0).context


@pytest.mark.parametrize(("kind", "torchs"), [("gru", torch.nn.GRU), ("lstm", torch.nn.LSTM)])
@pytest.mark.parametrize("layers", [1, 4])
def test_a_recurrent_context_is_torchs_of_that_depth(kind, torchs, layers):
    made = context(kind=kind, layers=layers)
    expected = torchs(6, 8, layers, batch_first=True)
    expected.load_state_dict(getattr(made, kind).state_dict())
    z_BTC = torch.randn(2, 9, 6)
    torch.testing.assert_close(made(z_BTC), expected(z_BTC)[0])


def test_a_transformer_context_maps_z_to_its_width_first():
    made = context(kind="transformer", layers=5, heads=2)
    z_BTC = torch.randn(2, 9, 6)
    torch.testing.assert_close(made(z_BTC), made.transformer(made.project(z_BTC)))
    assert len(made.transformer.blocks) == 5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layers": 5}, "layers=5 of kind gru .* use 1 to 4, or kind=transformer"),
        ({"kind": "lstm", "layers": 6}, "layers=6 of kind lstm"),
        ({"layers": -1}, "model.context.layers=-1 is below 0"),
        ({"width": -1}, "model.context.width=-1 is below 0"),
        ({"heads": -1}, "model.context.heads=-1 is below 0"),
        ({"kind": "transformer", "heads": 5}, "model.context.heads=5 does not split model.context.width=256"),
        ({"kind": "transformer", "width": 10}, "model.context.heads=4 does not split model.context.width=10"),
        ({"kind": "rnn"}, "'rnn'"),
        ({"positions": "absolute"}, "'absolute'"),
    ],
)
def test_a_context_that_cannot_be_is_refused_with_the_way_out(values, words):
    with pytest.raises(UserError, match=words):
        config.build(ModelConfig, {"context": values})


def test_heads_matter_to_a_transformer_alone():
    assert context(kind="gru", heads=5)(torch.zeros(1, 3, 6)).shape == (1, 3, 8)
