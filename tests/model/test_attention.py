"""The transformer against one written out: every head, query and key by itself, in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpcscale.errors import UserError
from cpcscale.model import attention
from cpcscale.model.attention import Block, Transformer


def transformer(positions: str, *, width: int = 12, layers: int = 2, heads: int = 3) -> Transformer:
    torch.manual_seed(3)
    made = Transformer(width, layers, heads, positions).double()
    # Far from their small start, so that attention is sharp and every term counts.
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return made


def score(query: Tensor, key: Tensor, t: int, s: int, head: int, heads: int, positions: str) -> float:
    width = len(query)
    if positions == "relative":
        return float(query @ key) / math.sqrt(width) - 2 ** (-8 * (head + 1) / heads) * (t - s)
    # A pair is a complex number; turning both ends by their places leaves the difference (Su et al. 2021, eq. 16).
    pairs = [torch.complex(vector[: width // 2], vector[width // 2 :]) for vector in (query, key)]
    turns = 10_000 ** (-2 * torch.arange(width // 2).double() / width) * (t - s)
    turned = pairs[0] * torch.polar(torch.ones_like(turns), turns) * pairs[1].conj()
    return float(turned.real.sum()) / math.sqrt(width)


def written_out(block: Block, x_TD: Tensor, heads: int, positions: str) -> Tensor:
    parts = block.query_key_value(block.attention_norm(x_TD)).chunk(3, dim=1)
    query, key, value = (part.chunk(heads, dim=1) for part in parts)
    rows = []
    for t in range(len(x_TD)):
        row = []
        for h in range(heads):
            scores = [score(query[h][t], key[h][s], t, s, h, heads, positions) for s in range(t + 1)]
            row.append(torch.tensor(scores).double().softmax(0) @ value[h][: t + 1])
        rows.append(torch.cat(row))
    x_TD = x_TD + block.mix(torch.stack(rows))
    return x_TD + block.down(F.gelu(block.up(block.dense_norm(x_TD))))


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_the_transformer_is_the_one_written_out(positions):
    made = transformer(positions)
    x_BTD = torch.randn(2, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = x_BTD
        for block in made.blocks:
            expected = torch.stack([written_out(block, x_TD, 3, positions) for x_TD in expected])
        # Angles are computed in single precision.
        torch.testing.assert_close(made(x_BTD), made.norm(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_the_order_of_past_frames_is_heard(positions):
    made = transformer(positions, layers=1)
    x_BTD = torch.randn(1, 6, 12, dtype=torch.float64)
    swapped = x_BTD[:, [0, 3, 2, 1, 4, 5]]
    assert (made(x_BTD)[:, 5] - made(swapped)[:, 5]).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_no_frames_give_no_frames(positions):
    assert transformer(positions)(torch.zeros(2, 0, 12).double()).shape == (2, 0, 12)


def test_weights_start_as_in_gpt_2():
    torch.manual_seed(0)
    made = Transformer(256, 8, 4, "rotary")
    for block in made.blocks:
        for layer, deviation in [
            (block.query_key_value, 0.02),
            (block.up, 0.02),
            (block.mix, 0.02 / math.sqrt(16)),
            (block.down, 0.02 / math.sqrt(16)),
        ]:
            assert layer.weight.std().item() == pytest.approx(deviation, rel=0.02)
            assert not layer.bias.any()


@pytest.mark.parametrize(
    ("heads", "width", "positions", "words"),
    [
        (8, 100, "relative", "heads=8 does not split model.context.width=100 into equal heads: use model.x.heads=5"),
        (8, 100, "rotary", "into equal heads: use model.x.heads=5"),
        (4, 12, "rotary", "into heads of even width, which rotary positions need: use model.x.heads=3"),
        (2, 7, "rotary", "use another model.context.width"),
    ],
)
def test_heads_that_do_not_split_the_width_are_refused_with_some_that_do(heads, width, positions, words):
    with pytest.raises(UserError, match=words):
        attention.check_heads("model.x", heads, width, positions)


def test_heads_that_split_the_width_are_taken():
    attention.check_heads("model.x", 4, 12, "relative")
    attention.check_heads("model.x", 3, 12, "rotary")
    attention.check_heads("model.x", 1, 7, "relative")
