import pytest

from cpcscale.errors import UserError
from cpcscale.train.optim import OptimConfig, learning_rate


def test_the_rate_is_constant_without_warm_up():
    spec = OptimConfig(learning_rate=2e-4)
    assert {learning_rate(spec, step) for step in (0, 1, 10, 10**6)} == {2e-4}


def test_warm_up_rises_by_equal_parts_and_ends_at_the_rate():
    spec = OptimConfig(learning_rate=0.8, warmup_steps=4)
    assert [learning_rate(spec, step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


@pytest.mark.parametrize(
    "bad", [{"learning_rate": -1.0}, {"weight_decay": -1e-9}, {"warmup_steps": -1}, {"clip_norm": -0.5}]
)
def test_a_negative_setting_is_refused_by_its_name(bad):
    with pytest.raises(UserError, match=f"optim.{next(iter(bad))}"):
        OptimConfig(**bad)
