"""What becomes of steps whose gradient is not finite or far too large."""

import json
import math

import pytest

from mf_dist.config.schema import OptimConfig
from mf_dist.training.gradient_guard import WARM_UP, GradientGuard


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_a_norm_that_is_not_finite_leaves_the_step_out(norm):
    guard = GradientGuard(OptimConfig())
    assert [guard.judge(n) for n in (1.0, norm, norm, 2.0)] == [1.0, 0.0, 0.0, 1.0]
    assert guard.skipped == 2 and guard.skipped_in_row == 0 and guard.last == ""


@pytest.mark.parametrize("action", ["clip", "skip"])
def test_a_spike_is_seen_after_the_warm_up(action):
    guard = GradientGuard(OptimConfig(spike_factor=10.0, spike_action=action))
    assert all(guard.judge(n) == 1.0 for n in [1e6, *[2.0] * (WARM_UP - 1)])  # no mean to trust yet
    for _ in range(3000):
        assert guard.judge(2.0) == 1.0
    assert guard.mean == pytest.approx(2.0, rel=1e-3) and guard.judge(19.9) == 1.0
    mean = guard.mean
    factor = guard.judge(200.0)
    assert factor == (pytest.approx(10 * mean / 200) if action == "clip" else 0.0)
    assert guard.mean < 1.2 * mean, "a spike must not raise its own limit much"
    assert (guard.clipped, guard.skipped) == ((1, 0) if action == "clip" else (0, 1))


def test_state_survives_json_bit_for_bit():
    one, other = GradientGuard(OptimConfig(spike_factor=2.0)), GradientGuard(OptimConfig(spike_factor=2.0))
    for n in range(50):
        one.judge(1 + 0.37 * math.sin(n))
    other.load_state(json.loads(json.dumps(one.state())))
    assert [one.judge(n) for n in (1.1, 9.0, 1.3)] == [other.judge(n) for n in (1.1, 9.0, 1.3)]
    assert one.state() == other.state()
