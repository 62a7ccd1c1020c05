"""The loss compared with the authors' full-batch form, row by row, and its gradient, in float64."""

import dataclasses

import pytest
import torch
from oracles import full_batch_rows, random_batch, small_dit

from mf_dist.config.objectives import MeanFlowConfig
from mf_dist.objectives.meanflow import MeanFlowLoss, meanflow_loss, velocity_in_interval

RECIPES = {
    "plain": MeanFlowConfig(),
    "omega": MeanFlowConfig(omega=2.0),
    "kappa": MeanFlowConfig(omega=1.0, kappa=0.5),
    "xl2": MeanFlowConfig(omega=0.2, kappa=0.92, guidance_start=0.0, guidance_end=0.75),
    "xl2plus": MeanFlowConfig(omega=1.0, kappa=0.5, guidance_start=0.3, guidance_end=0.8),
    "p=0.5": MeanFlowConfig(kappa=0.5, adaptive_p=0.5, adaptive_eps=0.1),
}
NULL = 3


def batch(rows=12, n_eq=9, seed=0):
    return random_batch(NULL, rows, n_eq, seed, dropped=(0, 4))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("n_eq", [9, 0, 12])
def test_equals_the_full_batch_form_row_for_row(name, n_eq):
    """First single rows, so that errors of several rows cannot cancel; then value and gradient of the whole batch."""
    recipe, net = RECIPES[name], small_dit()
    x, e, r, t, y = batch(n_eq=n_eq)
    s, weighted = full_batch_rows(net, x, e, r, t, y, NULL, recipe)
    for row in range(0, 12, 3):
        rows = slice(row, row + 1)
        loss, _ = meanflow_loss(net, x[rows], e[rows], r[rows], t[rows], y[rows], int(row < n_eq), NULL, recipe)
        torch.testing.assert_close(loss, weighted[row], atol=1e-10, rtol=1e-10)
    loss, sums = meanflow_loss(net, x, e, r, t, y, n_eq, NULL, recipe)
    torch.testing.assert_close(loss, weighted.mean(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(sums["raw_loss_r_equals_t"][0].double(), s[:n_eq].sum(), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(sums["raw_loss_r_below_t"][0].double(), s[n_eq:].sum(), atol=1e-3, rtol=1e-5)
    assert sums["raw_loss_r_equals_t"][1] == n_eq and sums["raw_loss_r_below_t"][1] == 12 - n_eq
    ours = torch.autograd.grad(loss, list(net.parameters()))
    theirs = torch.autograd.grad(weighted.mean(), list(net.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_gradient_is_that_of_a_regression_on_a_constant():
    """d loss = mean of w d ||u - c||^2 with constant target c and weight w: no gradient through the target."""
    recipe, net = RECIPES["kappa"], small_dit()
    x, e, r, t, y = batch()
    loss, _ = meanflow_loss(net, x, e, r, t, y, 9, NULL, recipe)
    ours = torch.autograd.grad(loss, list(net.parameters()))
    u = net((1 - t)[:, None, None, None] * x + t[:, None, None, None] * e, r, t, y)
    with torch.no_grad():
        s, _ = full_batch_rows(net, x, e, r, t, y, NULL, recipe)
        w = 1 / (s + recipe.adaptive_eps)
    c = _targets(net, x, e, r, t, y, recipe)
    expected = torch.autograd.grad((w * ((u - c) ** 2).sum(dim=(1, 2, 3))).mean(), list(net.parameters()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def _targets(net, x, e, r, t, y, recipe):
    """u_tgt of every row, by finite differences along (v_g, 0, 1) in float64: independent of both JVPs."""
    col = t[:, None, None, None]
    z, v = (1 - col) * x + col * e, e - x
    with torch.no_grad():
        v_g = velocity_in_interval(v, net(z, t, t, y), net(z, t, t, torch.full_like(y, NULL)), t, y, NULL, recipe)
        h = 1e-6
        du_dt = (net(z + h * v_g, r, t + h, y) - net(z - h * v_g, r, t - h, y)) / (2 * h)
        return v_g - (t - r)[:, None, None, None] * du_dt


def test_r_equals_t_regresses_on_the_guided_velocity_for_any_net():
    recipe, net = RECIPES["kappa"], small_dit()
    x, e, _, t, y = batch()
    c = _targets(net, x, e, t, t, y, recipe)
    col = t[:, None, None, None]
    z = (1 - col) * x + col * e
    v_g = velocity_in_interval(e - x, net(z, t, t, y), net(z, t, t, torch.full_like(y, NULL)), t, y, NULL, recipe)
    torch.testing.assert_close(c, v_g)
    _, sums = meanflow_loss(net, x, e, t, t, y, 12, NULL, recipe)
    s = ((net(z, t, t, y) - v_g) ** 2).sum()
    torch.testing.assert_close(sums["raw_loss_r_equals_t"][0].double(), s, atol=1e-3, rtol=1e-5)


def test_weight_by_gap_applies_to_rows_with_r_below_t():
    """At the begin each such row's loss is multiplied by (1 - (t - r)) / (1 - E[t - r]); at the end by 1."""
    recipe = dataclasses.replace(RECIPES["kappa"], gap_weight="progress", label_drop=0)
    uniform = dataclasses.replace(recipe, gap_weight="uniform")
    g = torch.Generator().manual_seed(3)
    x, e = torch.randn(2, 8, 3, 4, 4, generator=g, dtype=torch.float64)
    draws = {
        "e": e,
        "time_normals": torch.randn(8, 2, generator=g, dtype=torch.float64),
        "drop_uniforms": torch.ones(8),
    }
    y, times = torch.zeros(8, dtype=torch.int64), draws["time_normals"]
    draw = torch.sigmoid(-0.4 + times[6:])
    gap = draw.amax(dim=1) - draw.amin(dim=1)

    def loss(recipe, s):
        return MeanFlowLoss(small_dit(), recipe)(x, y, draws, torch.tensor(s, dtype=torch.float64))[0]

    rows = full_batch_rows(small_dit(), x, e, *(torch.cat([t, o]) for t, o in _times(times)), y, NULL, uniform)[1]
    expected = rows.clone()
    expected[6:] *= (1 - gap) / (1 - recipe.mean_gap)
    torch.testing.assert_close(loss(recipe, 1.0), expected.mean(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(loss(recipe, 0.0), loss(uniform, 0.0), atol=0, rtol=0)
    torch.testing.assert_close(loss(uniform, 0.3), rows.mean(), atol=1e-10, rtol=1e-10)


def _times(normals):
    """r and t of six r = t rows and two others, each in two parts."""
    t, r = (torch.sigmoid(-0.4 + normals)).sort(dim=1, descending=True)[0].unbind(1)
    return (t[:6], r[6:]), (t[:6], t[6:])


def test_target_keeps_no_graph():
    """As many bytes are saved for backward as by plain flow matching."""
    net = small_dit()
    x, e, r, t, y = batch()

    def saved_bytes(recipe, n_eq):
        tensors = {}

        def keep(tensor):
            tensors[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        times = (t, t) if n_eq == 12 else (r, t)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            meanflow_loss(net, x, e, *times, y, n_eq, NULL, recipe)
        return sum(tensors.values())

    flow = saved_bytes(dataclasses.replace(RECIPES["plain"]), 12)
    assert saved_bytes(RECIPES["kappa"], 9) <= 1.02 * flow


def test_module_draws_times_and_drops_and_splits_rows():
    recipe = dataclasses.replace(RECIPES["kappa"], label_drop=0.75)
    module = MeanFlowLoss(small_dit(), recipe)
    g = torch.Generator().manual_seed(3)
    x, e = torch.randn(2, 8, 3, 4, 4, generator=g, dtype=torch.float64)
    normals, uniforms = torch.randn(8, 2, generator=g, dtype=torch.float64), torch.rand(8, generator=g)
    seen = []
    handle = module.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    draws = {"e": e, "time_normals": normals, "drop_uniforms": uniforms}
    loss, sums = module(x, torch.zeros(8, dtype=torch.int64), draws, torch.zeros(()))
    handle.remove()
    assert torch.isfinite(loss) and sums["raw_loss_r_below_t"][1] == 2
    assert [len(inputs[0]) for inputs in seen] == [8 + 2, 2, 8]  # null on all with y on r < t, JVP, regression
    _, r, t, y = seen[-1]
    assert torch.equal(r[:6], t[:6]) and (r[6:] < t[6:]).all()
    assert (y[:6] == NULL).all() and (y[6:] == 0).all()  # a share of 0.75 is every r = t row, and no other
