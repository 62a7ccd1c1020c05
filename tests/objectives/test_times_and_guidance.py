"""Times, label drop, guidance and path: quantiles, shares and limiting cases."""

import numpy as np
import pytest
import torch
from scipy import stats

from mf_dist.config.objectives import MeanFlowConfig
from mf_dist.objectives.guidance import drop_labels
from mf_dist.objectives.meanflow import velocity_in_interval
from mf_dist.objectives.path import path
from mf_dist.objectives.times import sample_times
from mf_dist.objectives.weighting import gap_weight

N = 200_000


def normals():
    return torch.randn(N, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_times_have_the_quantiles_of_the_larger_and_smaller_of_two_logit_normals():
    r, t = sample_times(normals(), N // 2, mean=-0.4, std=1.0)
    assert torch.equal(r[: N // 2], t[: N // 2]) and (r[N // 2 :] < t[N // 2 :]).all()
    cdf = lambda a: stats.norm.cdf(np.log(a / (1 - a)) + 0.4)  # noqa: E731
    # on r = t rows too, t is the larger of two draws: P(t <= a) = F(a)^2
    for rows in (t[: N // 2], t[N // 2 :]):
        assert stats.kstest(rows.numpy(), lambda a: cdf(a) ** 2).statistic < 0.006
    assert stats.kstest(r[N // 2 :].numpy(), lambda a: 1 - (1 - cdf(a)) ** 2).statistic < 0.006


@pytest.mark.parametrize(("n_eq", "eligible"), [(3 * N // 4, "first"), (N, "all"), (0, "all"), (N // 20, "all")])
def test_share_of_dropped_labels_and_which_rows_are_eligible(n_eq, eligible):
    uniforms = torch.rand(N, generator=torch.Generator().manual_seed(1))
    dropped = drop_labels(torch.zeros(N, dtype=torch.int64), uniforms, n_eq, share=0.1, null_label=7) == 7
    assert abs(dropped.float().mean() - 0.1) < 0.002
    if eligible == "first":
        assert not dropped[n_eq:].any()
        assert abs(dropped[:n_eq].float().mean() - 0.1 / 0.75) < 0.003
    elif n_eq < N:
        assert abs(dropped[n_eq:].float().mean() - 0.1) < 0.003


def test_no_drop_and_full_drop():
    y, uniforms = torch.arange(4), torch.tensor([0.0, 0.3, 0.6, 0.9])
    assert torch.equal(drop_labels(y, uniforms, 3, 0.0, 9), y)
    assert (drop_labels(y, uniforms, 3, 1.0, 9) == 9).all()


def test_guided_velocity_inside_outside_and_dropped():
    recipe = MeanFlowConfig(omega=0.2, kappa=0.92, guidance_start=0.3, guidance_end=0.8)
    v, u_cond, u_null = (torch.full((5, 1, 1, 1), value) for value in (1.0, 10.0, 100.0))
    t, y = torch.tensor([0.29, 0.3, 0.5, 0.8, 0.81]), torch.tensor([0, 0, 4, 0, 0])
    v_g = velocity_in_interval(v, u_cond, u_null, t, y, 4, recipe).flatten()
    inside = 0.2 * 1 + 0.92 * 10 + (1 - 0.2 - 0.92) * 100
    torch.testing.assert_close(v_g, torch.tensor([1.0, inside, 1.0, inside, 1.0]))


def test_identity_guidance_gives_v():
    v, u_cond, u_null = torch.randn(3, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t, y = torch.rand(5), torch.zeros(5, dtype=torch.int64)
    torch.testing.assert_close(velocity_in_interval(v, u_cond, u_null, t, y, 4, MeanFlowConfig()), v)


def test_kappa_zero_is_the_classical_form():
    v, u_null = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t, y = torch.rand(5), torch.zeros(5, dtype=torch.int64)
    v_g = velocity_in_interval(v, None, u_null, t, y, 4, MeanFlowConfig(omega=3.0))
    torch.testing.assert_close(v_g, u_null + 3.0 * (v - u_null))


def test_weight_by_gap_has_mean_1_at_the_begin_and_is_1_at_the_end():
    recipe = MeanFlowConfig(time_mean=-0.4, time_std=1.0, gap_weight="progress")
    r, t = sample_times(normals(), 0, recipe.time_mean, recipe.time_std)
    assert (t - r).mean().item() == pytest.approx(recipe.mean_gap, rel=8e-3)
    weights = gap_weight(t - r, torch.tensor(recipe.schedule(0.0)), recipe.mean_gap)
    assert weights.mean().item() == pytest.approx(1, rel=3e-3)
    small, large = (t - r) < 0.1, (t - r) > 0.5
    assert weights[small].min() > 1.1 > 0.8 > weights[large].max() > 0
    torch.testing.assert_close(
        gap_weight(t - r, torch.tensor(0.5), recipe.mean_gap), (1 + weights) / 2, atol=1e-12, rtol=0
    )
    assert (gap_weight(t - r, torch.tensor(recipe.schedule(1.0)), recipe.mean_gap) == 1).all()


def test_path_runs_from_data_to_noise_at_constant_velocity():
    x, e = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(path(x, e, torch.zeros(3))[0], x) and torch.equal(path(x, e, torch.ones(3))[0], e)
    h = 1e-6
    z0, v = path(x, e, torch.full((3,), 0.4, dtype=torch.float64))
    z1, _ = path(x, e, torch.full((3,), 0.4 + h, dtype=torch.float64))
    torch.testing.assert_close((z1 - z0) / h, v, atol=1e-8, rtol=1e-8)
