"""The toy's closed forms against other computations, and its network's tangent."""

import pytest
import torch
import toy_field as field
from conftest import run_python


def points(count=50):
    g = torch.Generator().manual_seed(0)
    z, times = 2 * torch.randn(count, 2, dtype=torch.float64, generator=g), torch.rand(2, count, generator=g).double()
    return z, times.amin(0), times.amax(0)


def test_velocity_is_that_of_the_score():
    """v = -t s - (z + t^2 s) / (1 - t) with the score s = grad log p_t, here by autograd of the mixture's density."""
    z, _, t = points()
    z.requires_grad_()
    variance = (1 - t) ** 2 * field.STD**2 + t**2
    off = (z[:, None] - (1 - t)[:, None, None] * field.means()).square().sum(dim=2)
    log_p = torch.logsumexp(-off / (2 * variance[:, None]), dim=1)  # up to a constant of t
    (score,) = torch.autograd.grad(log_p.sum(), z)
    t = t[:, None]
    torch.testing.assert_close(
        field.marginal_velocity(z.detach(), t[:, 0]),
        -t * score - (z.detach() + t**2 * score) / (1 - t),
        rtol=1e-9,
        atol=1e-9,
    )


def test_average_velocity_satisfies_the_meanflow_identity():
    """u = v - (t - r) du/dt, with du/dt along the trajectory by a central difference."""
    z, r, t = points(20)
    keep = (t - r > 0.1) & (t < 0.95)
    z, r, t, h = z[keep], r[keep], t[keep], 1e-4
    after, before = (field.trajectory(z, t, t + d, steps=20)[-1] for d in (h, -h))
    du_dt = (field.average_velocity(after, r, t + h, 800) - field.average_velocity(before, r, t - h, 800)) / (2 * h)
    u, v = field.average_velocity(z, r, t, 800), field.marginal_velocity(z, t)
    torch.testing.assert_close(u, v - (t - r)[:, None] * du_dt, rtol=1e-4, atol=1e-4)


def test_the_flow_carries_noise_into_data():
    g, n = torch.Generator().manual_seed(1), 4000
    noise = torch.randn(n, 2, dtype=torch.float64, generator=g)
    ends = field.trajectory(noise, torch.ones(n).double(), torch.zeros(n).double())[-1]
    distance, mode = torch.cdist(ends, field.means()).min(dim=1)
    assert distance.square().mean().sqrt() == pytest.approx(2**0.5 * field.STD, rel=0.03)
    assert torch.bincount(mode, minlength=5).div(n).sub(0.2).abs().max() < 0.03


def test_tangent_of_the_network():
    from toy_flow import PlaneNet

    net = PlaneNet(torch.Generator().manual_seed(0)).double()
    z, r, t = points(7)
    z, dz = (
        z[:, :, None, None],
        torch.randn(7, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    )
    u, du = net(z, r, t, None, tangent=(dz, torch.zeros_like(r), torch.ones_like(t)))
    direction = (dz, torch.zeros_like(r), torch.ones_like(t))
    expected = torch.func.jvp(lambda z, r, t: net(z, r, t, None), (z, r, t), direction)
    torch.testing.assert_close((u, du), expected, rtol=1e-10, atol=1e-10)


def test_distance_and_share_off_the_modes():
    """A shifted set is at the distance of the shift; on a line, the sorted coupling is optimal."""
    from toy_flow import off_modes, wasserstein

    a = points(40)[0]
    assert wasserstein(a, (a + torch.tensor([0.3, -0.4])).flip(0)) == pytest.approx(0.5)
    line, other = a[:, :1] * torch.tensor([[1.0, 0.0]]), 3 * a[:, 1:] * torch.tensor([[1.0, 0.0]])
    coupled = (line[:, 0].sort()[0] - other[:, 0].sort()[0]).square().mean().sqrt()
    assert wasserstein(line, other) == pytest.approx(coupled.item())
    at = field.means()[[0, 1, 2, 3]] + torch.tensor([[0, 0], [2.9, 0], [3.1, 0], [0, -9]]) * field.STD
    assert off_modes(at) == 0.5


def test_the_rules_differ_only_in_the_target():
    """Direct regression by hand; at (r = t) all three have the same target e - x."""
    from toy_flow import RECIPE, PlaneNet, loss_of, sample_times

    net, g = PlaneNet(torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    x, e = torch.randn(2, 8, 2, 1, 1, generator=g)
    normals = torch.randn(8, 2, generator=g)
    r, t = sample_times(normals, 4, RECIPE.time_mean, RECIPE.time_std)
    assert (r[4:] < t[4:]).any() and (r[:4] == t[:4]).all()
    z = (1 - t)[:, None] * x[:, :, 0, 0] + t[:, None] * e[:, :, 0, 0]
    rows = (net(z[:, :, None, None], r, t, None) - (e - x)).square().sum(dim=(1, 2, 3))
    losses = {rule: loss_of(rule, net, x, e, normals, RECIPE) for rule in ("direct regression", "MeanFlow")}
    torch.testing.assert_close(losses["direct regression"], rows.mean())
    assert (losses["MeanFlow"] - losses["direct regression"]).abs() > 1e-3


@pytest.mark.dist
@pytest.mark.long
def test_the_tool_draws_pictures_and_prints_a_table(tmp_path):
    command = ["tools/study/toy_flow.py", "--steps", 400, "--seeds", 1, "--points", 400, "--out", tmp_path]
    cells = [line.split(" | ") for line in run_python(*command).stdout.splitlines() if line.startswith("| ")]
    distance = {name.strip("| "): float(cell.split()[0]) for name, cell, *_ in cells[1:]}
    assert distance["MeanFlow"] < 0.6 * min(distance["flow matching"], distance["direct regression"])
    assert distance["exact average velocity"] < distance["MeanFlow"]
    assert all((tmp_path / f"toy_{name}.png").stat().st_size > 5000 for name in ("paths", "secant", "samples"))
