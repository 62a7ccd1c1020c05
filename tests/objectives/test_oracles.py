"""The MeanFlow identity and the samplers on problems with a closed-form solution, in float64 to rounding error, without
training."""

import pytest
import torch
from oracles import Closed, GaussianData, point_mass

from mf_dist.config.objectives import MeanFlowConfig
from mf_dist.objectives.meanflow import meanflow_loss, meanflow_target
from mf_dist.objectives.sampler import sample_average, sample_euler, sample_restart, uniform_grid

PLAIN = MeanFlowConfig(omega=1.0, kappa=0.0)


def draws(rows=8, n_eq=4):
    g = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, rows, 2, 3, 3, generator=g, dtype=torch.float64)
    t, r = torch.rand(2, rows, generator=g, dtype=torch.float64).sort(dim=0, descending=True)[0].clamp(0.02, 0.98)
    r = torch.where(torch.arange(rows) < n_eq, t, r - 0.01)
    return x, e, r, t, torch.zeros(rows, dtype=torch.int64)


def test_point_mass_has_loss_zero():
    _, e, r, t, y = draws()
    x0 = torch.full_like(e, 0.7)
    loss, sums = meanflow_loss(Closed(point_mass(x0[:1])), x0, e, r, t, y, 4, 1, PLAIN)
    assert loss < 1e-20
    assert sums["raw_loss_r_equals_t"][0] < 1e-12 and sums["raw_loss_r_below_t"][0] < 1e-12


def gaussian_residual(tangent_sign=1.0, change=lambda v, r, t: (v, torch.zeros_like(r), torch.ones_like(t))):
    """max |u - (v - (t - r) du/dt)| over rows with r < t, with the marginal velocity as v."""
    data = GaussianData(s=0.5)
    x, e, r, t, y = draws(n_eq=0)
    z = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * e
    v, net = data.velocity(z, t), Closed(data.u)
    _, du_dt = net(z, r, t, y, tangent=change(v, r, t))
    u_tgt = v - tangent_sign * (t - r)[:, None, None, None] * du_dt
    return (net(z, r, t, y) - u_tgt).abs().max().item()


def test_gaussian_satisfies_the_identity_through_the_target():
    data = GaussianData(s=0.5)
    x, e, r, t, y = draws(n_eq=0)
    z = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * e
    u_null, v_g, du_dt = meanflow_target(Closed(data.u), z, data.velocity(z, t), r, t, y, 0, 1, PLAIN)
    u_tgt = v_g - (t - r)[:, None, None, None] * du_dt
    assert u_null is None
    torch.testing.assert_close(u_tgt, data.u(z, r, t), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tangent_sign": -1.0},
        {"change": lambda v, r, t: (v, torch.zeros_like(r), torch.zeros_like(t))},
        {"change": lambda v, r, t: (v, torch.ones_like(r), torch.zeros_like(t))},
        {"change": lambda v, r, t: (v, torch.ones_like(r), torch.ones_like(t))},
    ],
)
def test_wrong_sign_or_tangent_violates_the_identity(wrong):
    assert gaussian_residual() < 1e-12
    assert gaussian_residual(**wrong) > 1e-3


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_sampling_a_gaussian_is_exact_in_any_number_of_steps(nfe):
    data = GaussianData(s=0.5)
    z = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    x = sample_average(Closed(data.u), z[None], torch.zeros(4), uniform_grid(nfe))
    torch.testing.assert_close(x, data.s * z, atol=1e-12, rtol=1e-12)


def test_fresh_noise_between_steps_gives_the_same_law():
    """Each call gives a sample of the data exactly; what is left of the first noise is what the path keeps of x."""
    data = GaussianData(s=0.5)
    noise = torch.randn(2, 4000, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = sample_restart(Closed(data.u), noise, torch.zeros(4000), [1.0, 0.5, 0.0])
    assert x.std().item() == pytest.approx(data.s, rel=0.02)
    t, first = torch.tensor(0.5, dtype=torch.float64), data.s * noise[0]
    expected = data.s / data.sigma(t) * (0.5 * first + 0.5 * noise[1])
    torch.testing.assert_close(x, expected, atol=1e-12, rtol=1e-12)
    one = sample_restart(Closed(data.u), noise[:1], torch.zeros(4000), [1.0, 0.0])
    torch.testing.assert_close(one, first, atol=1e-12, rtol=1e-12)


def test_euler_steps_converge_at_first_order():
    data = GaussianData(s=0.5)
    z = torch.randn(4, 2, 3, 3, dtype=torch.float64)

    class Velocity:
        def __call__(self, z, r, t, y):
            assert torch.equal(r, t)
            return data.velocity(z, t)

    errors = [
        (sample_euler(Velocity(), z[None], torch.zeros(4), uniform_grid(n)) - data.s * z).abs().max() for n in (50, 100)
    ]
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_grid_of_times():
    assert uniform_grid(1) == [1.0, 0.0]
    assert uniform_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
