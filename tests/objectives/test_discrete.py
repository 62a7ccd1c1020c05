"""The discrete target and its losses in float64: limits, oracles with a closed form, and SoFlow's published loss."""

import dataclasses

import pytest
import torch
from oracles import Closed, GaussianData, column, random_batch, small_dit

from mf_dist.config.objectives import AlphaFlowConfig, MeanFlowConfig, SolutionFlowConfig
from mf_dist.objectives.alpha_flow import AlphaFlowLoss
from mf_dist.objectives.discrete import discrete_target
from mf_dist.objectives.meanflow import meanflow_target
from mf_dist.objectives.path import path
from mf_dist.objectives.solution_flow import SolutionFlowLoss, guidance_strength, solution_flow_loss
from mf_dist.objectives.times import sample_times_by_row

NULL = 3
UNGUIDED = MeanFlowConfig()


def batch(rows=12, n_eq=9):
    return random_batch(NULL, rows, n_eq, seed=0, dropped=(0, 4, 10))


def share(a):
    return torch.tensor(a, dtype=torch.float64)


@torch.no_grad()
def test_residual_tends_to_that_of_meanflow():
    """(u - u_tgt) / a -> u - v + (t - r) du/dt, with an error that falls linearly."""
    net = small_dit()
    x, e, r, t, y = batch(n_eq=0)
    z, v = path(x, e, t)
    _, _, du_dt = meanflow_target(net, z, v, r, t, y, 0, NULL, UNGUIDED)
    u = net(z, r, t, y)
    limit = u - (v - column(t - r) * du_dt)
    errors = []
    for a in (1e-2, 1e-3, 1e-4, 1e-6):
        residual = (u - discrete_target(net, z, v, r, t, y, share(a))[0]) / a
        errors.append(((residual - limit).norm() / limit.norm()).item())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.15) and errors[1] / errors[2] == pytest.approx(10, rel=0.02)
    assert errors[3] < 1e-5


@torch.no_grad()
def test_the_whole_share_is_trajectory_flow_matching():
    x, e, r, t, y = batch(n_eq=0)
    z, v = path(x, e, t)
    assert torch.equal(discrete_target(small_dit(), z, v, r, t, y, share(1.0))[0], v)


def gaussian(wrong=None):
    """max |u - u_tgt| of the closed form under the marginal velocity, for a few shares."""
    data = GaussianData(s=0.5)
    g = torch.Generator().manual_seed(0)
    t, r = torch.rand(2, 8, generator=g, dtype=torch.float64).sort(dim=0, descending=True)[0].clamp(0.05, 0.95)
    r = torch.minimum(r, t - 0.1)
    z = torch.randn(8, 2, 3, 3, generator=g, dtype=torch.float64)
    v, net = data.velocity(z, t), Closed(data.u)

    def residual(a):
        if wrong == "velocity":
            target = discrete_target(net, z, -v, r, t, None, share(a))[0]
        elif wrong == "time":
            target = a * v + (1 - a) * net(z - column(a * (t - r)) * v, r, t, None)
        elif wrong == "sign":
            target = a * v + (1 - a) * net(z + column(a * (t - r)) * v, r, t - a * (t - r), None)
        else:
            target = discrete_target(net, z, v, r, t, None, share(a))[0]
        return (net(z, r, t, None) - target).abs().max().item()

    return [residual(a) for a in (0.04, 0.02, 0.01)]


def test_closed_form_satisfies_the_discrete_target_to_second_order():
    """An Euler step of length a (t - r) misses the path by its square."""
    first, second, third = gaussian()
    for ratio in (first / second, second / third):
        assert torch.tensor(ratio).log2().item() == pytest.approx(2, abs=0.1)
    assert third < 1e-3


@pytest.mark.parametrize("wrong", ["velocity", "time", "sign"])
def test_a_wrong_direction_or_time_violates_it(wrong):
    assert min(gaussian(wrong)) > 1e-3


def published_loss(net, x, e, r, t, y, n_eq, a, recipe):
    """SoFlow, sections "Training objective" and "Guidance": two separate losses, guidance by its scale and the mix
    ratio, the consistency loss as an inner product with a constant."""
    mix, scale = 1 - recipe.kappa, recipe.omega / (1 - recipe.kappa)  # 0.25 and 3, as published

    def guided(z, v, t, y):
        with torch.no_grad():
            d = ((1 - t) / (1 - recipe.guidance_full_below)).clamp(0, 1 - 1e-6)
            strength = torch.where(t <= recipe.guidance_full_below, 1.0, 1 - torch.exp(-0.025 * d / (1 - d)))
            null = torch.full_like(y, NULL)
            full = v + column(strength) * (scale - 1) * (v - net(z, t, t, null))
            mixed = mix * full + (1 - mix) * net(z, t, t, y)
            return torch.where(column(y == NULL), v, mixed)

    rows = slice(n_eq)
    z, v = (1 - column(t)) * x + column(t) * e, e - x
    delta = (net(z[rows], t[rows], t[rows], y[rows]) - guided(z[rows], v[rows], t[rows], y[rows])).flatten(1)
    mean = delta.square().mean(1)
    velocity_loss = (mean / (mean.detach() + recipe.adaptive_eps) ** recipe.adaptive_p).mean()

    rows = slice(n_eq, None)
    z, v, t, s, y = z[rows], v[rows], column(t[rows]), column(r[rows]), y[rows]
    middle = t + (s - t) * a
    net_t = net(z, s.flatten(), t.flatten(), y)
    with torch.no_grad():
        moved = z + guided(z, v, t.flatten(), y) * (middle - t)
        f_t = z + (s - t) * net_t
        f_l = moved + (s - middle) * net(moved, s.flatten(), middle.flatten(), y)
        quotient = ((f_t - f_l) / (t - middle)).flatten(1)
        w = 1 / (quotient.square().mean(1, keepdim=True) + recipe.adaptive_eps) ** recipe.adaptive_p
    consistency_loss = (-(net_t.flatten(1) * quotient * w).mean(1)).mean()
    return (velocity_loss * n_eq + consistency_loss * (len(x) - n_eq)) / len(x)


@pytest.mark.parametrize("changes", [{}, {"adaptive_p": 0.75, "adaptive_eps": 0.1}, {"guidance_full_below": 0.3}])
def test_gradient_is_that_of_the_published_loss(changes):
    recipe, net = dataclasses.replace(SolutionFlowConfig(), **changes), small_dit()
    x, e, r, t, y = batch()
    loss, _ = solution_flow_loss(net, x, e, r, t, y, 9, NULL, share(0.03), recipe)
    ours = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    expected = published_loss(net, x, e, r, t, y, 9, 0.03, recipe)
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(net.parameters()))])
    assert (ours - theirs).norm() / theirs.norm() < 1e-12


@pytest.mark.parametrize("kind", [SolutionFlowConfig, AlphaFlowConfig])
def test_in_bf16_both_passes_of_the_difference_are_made_in_fp32(kind):
    """With weights that bf16 holds exactly the residual is that of fp32, and far from bf16's; so is the gradient, but
    for the backward's own rounding."""
    changes = {"clip": 1e9} if kind is AlphaFlowConfig else {}
    plain = {"omega": 1.0, "kappa": 0.0, "share_r_equals_t": 0, "label_drop": 0}
    recipe, module, (x, y, draws) = module_and_inputs(kind, **plain, **changes)
    module.phase = recipe.phase(0.5).name
    for p in [*module.net.parameters(), module.net.positions]:
        p.data = p.data.bfloat16().float()
    draws = {name: tensor.float() for name, tensor in draws.items()}
    inputs = x.float(), y, draws, torch.tensor(0.003)  # of 0.001 fp32's own rounding makes 1e-4, and more on some CPUs

    def loss_and_gradient(dtype, in_bf16):
        module.net.to(dtype)
        module.in_bf16 = in_bf16
        loss, sums = module(*inputs)
        gradient = torch.cat([g.flatten().float() for g in torch.autograd.grad(loss, list(module.net.parameters()))])
        return sums["raw_loss_r_below_t"][0].item(), gradient

    exact, exact_gradient = loss_and_gradient(torch.float32, False)
    rough, rough_gradient = loss_and_gradient(torch.bfloat16, False)
    found, gradient = loss_and_gradient(torch.bfloat16, True)
    assert abs(found / exact - 1) < 1e-4 < 0.01 < abs(rough / exact - 1)

    def error(g):
        return ((g - exact_gradient).norm() / exact_gradient.norm()).item()

    assert error(gradient) < 0.1 and 5 * error(gradient) < error(rough_gradient)


def test_guidance_fades_smoothly():
    t = torch.tensor([0.0, 0.5, 0.8, 0.8001, 0.9, 1.0], dtype=torch.float64)
    g = guidance_strength(t, 0.8)
    torch.testing.assert_close(g[:4], torch.ones(4, dtype=torch.float64), atol=1e-9, rtol=0)
    assert 0.02 < g[4] < 0.03 and g[5] == 0
    assert torch.equal(guidance_strength(t, 1.0), torch.ones_like(t))


def test_times_of_solution_flow():
    from scipy import stats

    normals = torch.randn(40_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r, t = sample_times_by_row(normals, 20_000, (-0.2, 1.0), (0.2, 0.8), (-1.0, 0.8))
    assert torch.equal(r[:20_000], t[:20_000]) and (t - r)[20_000:].min() >= 1e-4 * (1 - 1e-9) and r.min() >= 0
    for rows, mean, std in ((slice(20_000), -0.2, 1.0), (slice(20_000, None), 0.2, 0.8)):
        assert stats.kstest(torch.logit(t[rows]).numpy(), "norm", (mean, std)).pvalue > 1e-3


class Counted:
    """A network that notes the rows of each call, and whether it has a tangent."""

    def __init__(self, module):
        self.calls = []
        module.net.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, _, inputs, options):
        self.calls.append((len(inputs[0]), "tangent" in options))


def module_and_inputs(kind, **changes):
    g = torch.Generator().manual_seed(3)
    recipe = kind(**changes)
    module = (AlphaFlowLoss if kind is AlphaFlowConfig else SolutionFlowLoss)(small_dit(), recipe)
    x, e = torch.randn(2, 8, 3, 4, 4, generator=g, dtype=torch.float64)
    normals, uniforms = torch.randn(8, 2, generator=g, dtype=torch.float64), torch.rand(8, generator=g)
    draws = {"e": e, "time_normals": normals, "drop_uniforms": uniforms}
    return recipe, module, (x, torch.zeros(8, dtype=torch.int64), draws)


def test_calls_of_the_network_in_each_phase():
    """Guidance and regression, and on r < t rows nothing, a second forward, or one with a tangent."""
    recipe, module, inputs = module_and_inputs(AlphaFlowConfig, kappa=0.5)
    net = Counted(module)
    for phase, a, extra in (
        (recipe.TRAJECTORY, 1.0, []),
        (recipe.DISCRETE, 0.3, [(4, False)]),
        (recipe.MEANFLOW, 0.0, [(4, True)]),
    ):
        module.phase, net.calls = phase, []
        loss, sums = module(*inputs, torch.tensor(a))
        assert net.calls == [(12, False), *extra, (8, False)] and torch.isfinite(loss)
        assert sums["du_dt_norm"][1] == (4 if phase == recipe.MEANFLOW else 0)
        assert sums.keys() == recipe.SUMS.keys()
    recipe, module, inputs = module_and_inputs(SolutionFlowConfig)
    net = Counted(module)
    _, sums = module(*inputs, torch.tensor(0.1))
    assert net.calls == [(10, False), (2, False), (8, False)] and sums.keys() == recipe.SUMS.keys()


def gradient(module, inputs, phase, a):
    module.phase = phase
    loss, _ = module(*inputs, torch.tensor(a, dtype=torch.float64))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.net.parameters()))])


def test_gradients_of_alpha_flow_meet_where_phases_do():
    """At a = 1 exactly. At a -> 0 the directions meet; the weight a / (m + eps) of a residual that shrinks with a tends
    to a^2 / eps, so that the r < t rows' gradient falls to nothing before MeanFlow's begins (docs/design.md)."""
    recipe, module, inputs = module_and_inputs(AlphaFlowConfig, kappa=0.5, clip=1e9, share_r_equals_t=0)
    first = gradient(module, inputs, recipe.TRAJECTORY, 1.0)
    torch.testing.assert_close(gradient(module, inputs, recipe.DISCRETE, 1.0), first, atol=1e-12, rtol=1e-10)
    recipe, module, inputs = module_and_inputs(
        AlphaFlowConfig, kappa=0.5, clip=1e9, share_r_equals_t=0, adaptive_eps=1e9
    )
    last = gradient(module, inputs, recipe.MEANFLOW, 0.0)
    a = 1e-6
    near = gradient(module, inputs, recipe.DISCRETE, a) / a**2  # with a large eps the rows' weights are equal
    assert (near - last).norm() / last.norm() < 1e-5


def test_the_discrete_target_is_clipped():
    recipe, module, inputs = module_and_inputs(AlphaFlowConfig, clip=1e-9, share_r_equals_t=0, label_drop=0)
    module.phase = recipe.DISCRETE
    _, sums = module(*inputs, torch.tensor(0.5))
    x, _, draws = inputs
    module.phase = recipe.TRAJECTORY
    u = []
    module.net.register_forward_hook(lambda _m, _i, output: u.append(output))
    module(*inputs, torch.tensor(1.0))
    assert sums["raw_loss_r_below_t"][0].item() == pytest.approx(u[0].square().sum().item(), rel=1e-5)


def test_schedules():
    recipe = SolutionFlowConfig()
    assert [recipe.schedule(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.1, (0.1 * 0.002) ** 0.5, 0.002])
    recipe = AlphaFlowConfig(window_start=0.5, window_end=5 / 6)
    begin, end = (phase.begin for phase in recipe.phases[1:])
    assert (
        recipe.schedule(0.0) == recipe.schedule(begin - 1e-9) == 1 and recipe.schedule(end) == recipe.schedule(1) == 0
    )
    assert recipe.schedule(begin) == pytest.approx(0.995) and recipe.schedule(end - 1e-9) == pytest.approx(
        0.005, rel=1e-4
    )
    assert recipe.schedule(2 / 3) == pytest.approx(0.5)
    assert [recipe.phase(p).name for p in (0, begin, end, 1)] == [
        recipe.TRAJECTORY,
        recipe.DISCRETE,
        recipe.MEANFLOW,
        recipe.MEANFLOW,
    ]
    assert end - begin == pytest.approx(0.4235 / 3, abs=1e-4)
