import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional import concordance_corrcoef

from cpcscale.emotion.scores.ccc import ccc
from cpcscale.objective.ccc import batch_ccc, ccc_loss, ccc_loss_gradient

THIRDS = (1 / 3, 1 / 3, 1 / 3)


def pair(rows: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(3, 1, (rows, 3))
    return truth, 0.6 * truth + rng.normal(0.5, 0.7, (rows, 3))


def lins_loss(guess: torch.Tensor, truth: torch.Tensor, weights: tuple[float, float, float]) -> torch.Tensor:
    """The loss as the papers write it, nothing but the formula."""
    covariance = ((guess - guess.mean(0)) * (truth - truth.mean(0))).mean(0)
    spread = guess.var(0, correction=0) + truth.var(0, correction=0) + (guess.mean(0) - truth.mean(0)) ** 2
    return 1 - (2 * covariance / spread * torch.tensor(weights, dtype=torch.float64)).sum()


def gradients(guess: torch.Tensor, truth: torch.Tensor, weights: tuple[float, float, float]) -> list[torch.Tensor]:
    """The gradient by each guess three ways: in closed form, by autograd through ours, by autograd of the formula."""
    by_autograd = []
    for loss in (ccc_loss, lins_loss):
        leaf = guess.clone().requires_grad_()
        loss(leaf, truth, weights).backward()
        by_autograd.append(leaf.grad)
    return [ccc_loss_gradient(guess, truth, weights), *by_autograd]


def test_the_metric_is_lins_formula_written_out():
    truth, guess = pair()
    x, y = truth[:, 1], guess[:, 1]
    expected = 2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    assert ccc(truth, guess)[1] == pytest.approx(expected, abs=1e-14)


def test_the_metric_agrees_with_an_independent_implementation():
    truth, guess = pair()
    # torchmetrics takes unbiased variances; over n copies of the rows the two definitions meet as 1 / n.
    many = [torch.from_numpy(np.tile(array, (2000, 1))) for array in (guess, truth)]
    np.testing.assert_allclose(ccc(truth, guess), concordance_corrcoef(*many).numpy(), atol=1e-5)


def test_with_equal_means_the_metric_equals_the_independent_one_exactly():
    truth, guess = pair()
    guess += truth.mean(axis=0) - guess.mean(axis=0)
    other = concordance_corrcoef(torch.from_numpy(guess), torch.from_numpy(truth)).numpy()
    np.testing.assert_allclose(ccc(truth, guess), other, atol=1e-12)


def test_metric_and_loss_are_one_formula():
    truth, guess = pair()
    weights = (0.2, 0.5, 0.3)
    loss = ccc_loss(torch.from_numpy(guess), torch.from_numpy(truth), weights)
    assert loss.item() == pytest.approx(1 - ccc(truth, guess) @ weights, abs=1e-12)


@given(st.integers(2, 20), st.floats(-100, 100), st.floats(0.01, 100), st.integers(0, 99))
def test_ccc_is_bounded_symmetric_and_free_of_a_common_unit(rows, shift, scale, seed):
    truth, guess = pair(rows, seed)
    value = ccc(truth, guess)
    assert (np.abs(value) <= 1).all()
    np.testing.assert_allclose(value, ccc(guess, truth), atol=1e-12)
    np.testing.assert_allclose(value, ccc(scale * truth + shift, scale * guess + shift), atol=1e-8)


def test_perfect_agreement_is_1_and_a_mirrored_guess_is_minus_1():
    truth, _ = pair()
    np.testing.assert_allclose(ccc(truth, truth), 1)
    np.testing.assert_allclose(ccc(truth, 2 * truth.mean(axis=0) - truth), -1)


@pytest.mark.parametrize("constant", [0.1, 2.7, 1e6])
def test_constant_columns_score_exactly_0(constant):
    truth, guess = pair()
    flat = np.full_like(truth, constant)
    for left, right in ((truth, flat), (flat, guess), (flat, flat), (truth[:1], guess[:1])):
        np.testing.assert_array_equal(ccc(left, right), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case", ["constant guess", "constant labels", "both", "both but for rounding", "one sample", "one perfect sample"]
)
def test_degenerate_batches_have_loss_1_and_finite_gradients(case, dtype):
    truth, guess = (torch.from_numpy(array).to(dtype) for array in pair())
    flat = torch.full_like(truth, 0.1)
    guess, truth = {
        "constant guess": (flat, truth),
        "constant labels": (guess, flat),
        "both": (flat, flat),
        "both but for rounding": (flat.double() + 1e-13 * guess, flat.double() + 1e-13 * truth),
        "one sample": (guess[:1], truth[:1]),
        "one perfect sample": (guess[:1], guess[:1]),
    }[case]
    guess = guess.clone().requires_grad_()
    loss = ccc_loss(guess, truth, THIRDS)
    loss.backward()
    closed = ccc_loss_gradient(guess, truth, THIRDS)
    assert loss.item() == 1
    assert torch.isfinite(guess.grad).all() and torch.isfinite(closed).all()
    torch.testing.assert_close(closed.to(guess.dtype), guess.grad)
    # A network that starts as a constant can leave it; where no guess could do better, none is moved.
    assert (guess.grad.abs().sum() > 0) == (closed.abs().sum() > 0) == (case == "constant guess")


def test_from_a_constant_the_gradient_is_that_of_lins_formula():
    truth, _ = (torch.from_numpy(array) for array in pair())
    closed, ours, formula = gradients(torch.full_like(truth, 0.1), truth, THIRDS)
    torch.testing.assert_close(closed, formula, atol=1e-14, rtol=1e-10)
    torch.testing.assert_close(ours, formula, atol=1e-14, rtol=1e-10)


def test_a_value_that_is_not_a_number_is_never_hidden():
    truth, guess = pair()
    guess[3, 1] = np.nan
    loss = ccc_loss(torch.from_numpy(guess), torch.from_numpy(truth), THIRDS)
    assert np.isnan(ccc(truth, guess)).tolist() == [False, True, False] and torch.isnan(loss)
    closed = ccc_loss_gradient(torch.from_numpy(guess), torch.from_numpy(truth), THIRDS)
    assert closed.isnan().any(dim=0).tolist() == [False, True, False]


def test_the_gradient_is_that_of_finite_differences():
    truth, guess = (torch.from_numpy(array) for array in pair(7))
    assert torch.autograd.gradcheck(lambda x: ccc_loss(x, truth, (0.2, 0.5, 0.3)), guess.requires_grad_())


@given(
    st.integers(2, 40),
    st.floats(-100, 100),
    st.floats(0.01, 100),
    st.tuples(*[st.floats(0, 1)] * 3),
    st.integers(0, 99),
)
def test_the_closed_form_is_the_gradient_of_the_formula(rows, shift, scale, weights, seed):
    truth, guess = (torch.from_numpy(array) for array in pair(rows, seed))
    closed, ours, formula = gradients(scale * guess + shift, truth, weights)
    for other in (ours, formula):
        torch.testing.assert_close(closed, other, atol=1e-10 * max(formula.abs().max().item(), 1e-12), rtol=1e-7)


@given(st.integers(2, 40), st.integers(0, 99))
def test_the_gradient_has_no_part_along_a_common_unit(rows, seed):
    """CCC is unchanged when guess and labels are scaled or shifted together: by them, the derivatives cancel."""
    truth, guess = (torch.from_numpy(array) for array in pair(rows, seed))
    by_guess, by_truth = ccc_loss_gradient(guess, truth, THIRDS), ccc_loss_gradient(truth, guess, THIRDS)
    torch.testing.assert_close((by_guess + by_truth).sum(0), torch.zeros(3).double(), atol=1e-12, rtol=0)
    along = (by_guess * guess + by_truth * truth).sum(0)
    torch.testing.assert_close(along, torch.zeros(3).double(), atol=1e-11, rtol=0)


def test_a_large_offset_does_not_cancel_in_fp32():
    truth, guess = (torch.from_numpy(array) for array in pair())
    moved = batch_ccc((guess + 1024).float(), (truth + 1024).float())
    torch.testing.assert_close(moved, batch_ccc(guess, truth), atol=1e-3, rtol=0)
    closed, there = (
        ccc_loss_gradient(*each, THIRDS) for each in ((guess, truth), ((guess + 1024).float(), (truth + 1024).float()))
    )
    torch.testing.assert_close(there, closed, atol=1e-3 * closed.abs().max().item(), rtol=0)


def test_the_mean_over_parts_is_another_value():
    truth, guess = (torch.from_numpy(array[:, :1]) for array in pair(32))
    low, high = truth[:, 0].argsort().chunk(2)  # as sorted shards would split a batch over two ranks
    parts = (batch_ccc(guess[low], truth[low]) + batch_ccc(guess[high], truth[high])) / 2
    assert (batch_ccc(guess, truth) - parts).abs().item() > 0.1


def test_arrays_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        ccc(np.zeros((3, 3)), np.zeros(3))
