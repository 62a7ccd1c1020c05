"""GradientGuard on non-finite norms and on spikes."""

import json
import math

import pytest

from mf_dist.config.schema import OptimConfig
from mf_dist.training.gradient_guard import WARM_UP, GradientGuard


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_non_finite_norm_skips_the_step(norm):
    guard = GradientGuard(OptimConfig())
    assert [guard.judge(n) for n in (1.0, norm, norm, 2.0)] == [1.0, 0.0, 0.0, 1.0]
    assert guard.skipped == 2 and guard.skipped_in_row == 0 and guard.last_event == ""


@pytest.mark.parametrize("action", ["clip", "skip"])
def test_spike_is_detected_after_the_warm_up(action):
    guard = GradientGuard(OptimConfig(spike_factor=10.0, spike_action=action))
    # no spikes before the warm-up ends
    assert all(guard.judge(n) == 1.0 for n in [1e6, *[2.0] * (WARM_UP - 1)])
    for _ in range(3000):
        assert guard.judge(2.0) == 1.0
    assert guard.mean == pytest.approx(2.0, rel=1e-3) and guard.judge(19.9) == 1.0
    mean = guard.mean
    factor = guard.judge(200.0)
    assert factor == (pytest.approx(10 * mean / 200) if action == "clip" else 0.0)
    assert guard.mean < 1.2 * mean, "a spike must hardly raise the limit"
    assert (guard.clipped, guard.skipped) == ((1, 0) if action == "clip" else (0, 1))


def test_state_roundtrip_through_json_is_exact():
    guard, restored = GradientGuard(OptimConfig(spike_factor=2.0)), GradientGuard(OptimConfig(spike_factor=2.0))
    for n in range(50):
        guard.judge(1 + 0.37 * math.sin(n))
    restored.load_state(json.loads(json.dumps(guard.state())))
    assert [guard.judge(n) for n in (1.1, 9.0, 1.3)] == [restored.judge(n) for n in (1.1, 9.0, 1.3)]
    assert guard.state() == restored.state()
