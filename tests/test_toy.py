"""The toy's closed forms against other ways to the same numbers, and its network's tangent."""

import sys

import pytest
import torch
from conftest import ROOT, run_python


@pytest.fixture(scope="module")
def field():
    sys.path.insert(0, str(ROOT / "tools"))
    import toy_field

    yield toy_field
    sys.path.remove(str(ROOT / "tools"))


def points(count=50):
    g = torch.Generator().manual_seed(0)
    z, times = 2 * torch.randn(count, 2, dtype=torch.float64, generator=g), torch.rand(2, count, generator=g).double()
    return z, times.amin(0), times.amax(0)


def test_velocity_is_that_of_the_score(field):
    """v = -t s - (z + t^2 s) / (1 - t) with the score s = grad log p_t, here by autograd of the mixture's density."""
    z, _, t = points()
    z.requires_grad_()
    variance = (1 - t) ** 2 * field.STD**2 + t**2
    off = (z[:, None] - (1 - t)[:, None, None] * field.means()).square().sum(dim=2)
    log_p = torch.logsumexp(-off / (2 * variance[:, None]), dim=1)  # but for a constant of t
    (score,) = torch.autograd.grad(log_p.sum(), z)
    t = t[:, None]
    torch.testing.assert_close(
        field.marginal_velocity(z.detach(), t[:, 0]),
        -t * score - (z.detach() + t**2 * score) / (1 - t),
        rtol=1e-9,
        atol=1e-9,
    )


def test_average_velocity_satisfies_the_meanflow_identity(field):
    """u = v - (t - r) du/dt, with du/dt along the trajectory by a central difference."""
    z, r, t = points(20)
    keep = (t - r > 0.1) & (t < 0.95)
    z, r, t, h = z[keep], r[keep], t[keep], 1e-4
    after, before = (field.trajectory(z, t, t + d, steps=20)[-1] for d in (h, -h))
    du_dt = (field.average_velocity(after, r, t + h, 800) - field.average_velocity(before, r, t - h, 800)) / (2 * h)
    u, v = field.average_velocity(z, r, t, 800), field.marginal_velocity(z, t)
    torch.testing.assert_close(u, v - (t - r)[:, None] * du_dt, rtol=1e-4, atol=1e-4)


def test_the_flow_carries_noise_into_data(field):
    g, n = torch.Generator().manual_seed(1), 4000
    noise = torch.randn(n, 2, dtype=torch.float64, generator=g)
    ends = field.trajectory(noise, torch.ones(n).double(), torch.zeros(n).double())[-1]
    distance, mode = torch.cdist(ends, field.means()).min(dim=1)
    assert distance.square().mean().sqrt() == pytest.approx(2**0.5 * field.STD, rel=0.03)
    assert torch.bincount(mode, minlength=5).div(n).sub(0.2).abs().max() < 0.03


def test_tangent_of_the_network(field):
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


@pytest.mark.dist
def test_the_tool_draws_and_tells(tmp_path):
    lines = run_python("tools/toy_flow.py", "--steps", 400, "--points", 400, "--out", tmp_path).stdout.splitlines()
    distance = {line[:18].strip(): float(line.split("samples ")[1].split()[0]) for line in lines if "one-step" in line}
    assert distance["MeanFlow"] < 0.6 * min(distance["flow matching"], distance["direct regression"])
    assert all((tmp_path / f"toy_{name}.png").stat().st_size > 5000 for name in ("paths", "secant", "samples"))
