"""A sum of objectives: what cannot be learnt is refused, what rows share is compared, the best is that of the sum."""

import pytest
import torch

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.objective.objective import AutogradObjective, Rows
from cpcscale.runs.ledger import heldout_loss
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe


def test_a_sum_of_which_nothing_can_be_learnt_is_refused():
    with pytest.raises(UserError, match="nothing would be learnt"):
        config.load(Recipe, None, ["objective.weight=0"])


class Spread(AutogradObjective):
    """Squared distances between all rows, by a factor that all share."""

    compares_rows = True

    def loss(self, outputs, rows, pool=None):
        return (outputs[1] * (outputs[0][:, None] - pool.outputs[0]).square()).sum().view(1, 1)


def test_what_all_rows_share_may_stand_beside_rows_that_are_compared():
    x_B, factor = torch.tensor([1.0, 4.0, 6.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    (factor * (x_B[:, None] - x_B).square()).sum().backward()
    ranks = Ranks.current(torch.device("cpu"))
    rows = Rows(*4 * [torch.zeros(3, dtype=torch.int64)])
    _, gradients = Spread()((x_B.detach(), factor.detach()), rows, ranks, torch.ones(1))
    torch.testing.assert_close(gradients, (x_B.grad, factor.grad))


def test_the_best_checkpoint_is_that_of_all_that_was_learnt():
    assert heldout_loss({"heldout_loss": 2.0, "heldout_sum_loss": 3.0}) == 3.0
    assert heldout_loss({"heldout_loss": 2.0}) == 2.0 and heldout_loss({}) is None
