"""iMF's loss against the authors' full-batch form, row by row, and its gradient, in float64; the laws of its draws."""

import pytest
import torch
from oracles import column, func_jvp, random_batch, random_guidance, small_imf_dit

from mf_dist.config.objectives import ImfConfig
from mf_dist.models.imf_dit import Guidance
from mf_dist.objectives.guidance import sample_interval, sample_omega
from mf_dist.objectives.imf import ImfLoss, imf_loss

NULL = 3
RECIPE = ImfConfig()


def batch(rows=12, n_eq=6):
    """x, e, r, t, y before and after the label drop, guidance; r = t rows have the interval [0, 1]. Some t lie outside
    the interval of their row."""
    x, e, r, t, y = random_batch(NULL, rows, n_eq, seed=0, dropped=())
    dropped = y.clone()
    dropped[[row for row in (0, 4) if row < n_eq]] = NULL  # as the authors', of r = t rows alone
    guidance, is_equal = random_guidance(rows), torch.arange(rows) < n_eq
    start, end = torch.where(is_equal, 0.0, guidance.start), torch.where(is_equal, 1.0, guidance.end)
    return x, e, r, t, y, dropped, Guidance(guidance.omega, start, end)


def authors_rows(net, x, e, r, t, y, dropped, guidance, n_eq):
    """Per-row weighted loss as in the authors' code (imf.py of github.com/Lyy-iiis/imeanflow): guidance in three
    passes and one JVP, with the v head as its auxiliary output, on every row; labels are dropped afterwards."""
    z, v_t = (1 - column(t)) * x + column(t) * e, e - x
    omega, start, end = guidance

    def v_cond(w, labels):
        return net(z, t, t, labels, Guidance(w, torch.zeros_like(t), torch.ones_like(t)), head="both")[1].detach()

    v_c, v_u = v_cond(omega, y), v_cond(torch.ones_like(t), torch.full_like(y, NULL))
    v_g_fm = v_t + column(1 - 1 / omega) * (v_c - v_u)
    w = torch.where((t >= start) & (t <= end), omega, 1.0)
    v_c = v_cond(w, y)
    v_g = v_t + column(1 - 1 / w) * (v_c - v_u)
    v_g = torch.where(column(torch.arange(len(x)) < n_eq), v_g_fm, v_g)
    v_g = torch.where(column(dropped == NULL), v_t, v_g)
    at = (z, t, r)
    u, du_dt = func_jvp(
        lambda z, t, r: net(z, r, t, dropped, guidance, head="both")[0],
        at,
        (v_c, torch.ones_like(t), torch.zeros_like(r)),
    )
    v = net(z, r, t, dropped, guidance, head="both")[1]
    whole = u + column(t - r) * du_dt.detach()
    rows = [((a - v_g) ** 2).sum(dim=(1, 2, 3)) for a in (whole, v)]
    return sum(s / (s.detach() + RECIPE.adaptive_eps) ** RECIPE.adaptive_p for s in rows), rows


@pytest.mark.parametrize("n_eq", [6, 0, 4])
def test_equals_the_authors_full_batch_form_row_for_row(n_eq):
    """First single rows of every kind (r = t, dropped, r < t within and outside the interval); then value, log sums and
    gradient of the batch."""
    net = small_imf_dit()
    x, e, r, t, y, dropped, guidance = batch(n_eq=n_eq)
    inside = (guidance.start <= t) & (t <= guidance.end)
    assert 0 < inside[n_eq:].sum() < 12 - n_eq
    weighted, (s, s_head) = authors_rows(net, x, e, r, t, y, dropped, guidance, n_eq)
    for row in range(12):
        rows = slice(row, row + 1)
        own = Guidance(*(a[rows] for a in guidance))
        inputs = (net, x[rows], e[rows], r[rows], t[rows], dropped[rows], own, int(row < n_eq), NULL, RECIPE)
        torch.testing.assert_close(imf_loss(*inputs)[0], weighted[row], atol=1e-10, rtol=1e-10)
    loss, sums = imf_loss(net, x, e, r, t, dropped, guidance, n_eq, NULL, RECIPE)
    torch.testing.assert_close(loss, weighted.mean(), atol=1e-10, rtol=1e-10)
    for name, part in (("r_equals_t", s[:n_eq]), ("r_below_t", s[n_eq:])):
        total, count = sums[f"raw_loss_{name}"]
        assert count == len(part) and total.item() == pytest.approx(part.sum().item(), rel=1e-5)
    assert sums["velocity_head"][0].item() == pytest.approx(s_head.sum().item(), rel=1e-5)
    assert sums.keys() == RECIPE.SUMS.keys()
    ours = torch.autograd.grad(loss, list(net.parameters()))
    theirs = torch.autograd.grad(weighted.mean(), list(net.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_module_draws_guidance_and_calls_the_network_as_counted():
    """Rows through the blocks of each part: v(1 | null) on 8, v(omega') on 4, the JVP on 4, both heads on 8."""
    net, g = small_imf_dit(), torch.Generator().manual_seed(3)
    x, e = torch.randn(2, 8, 3, 4, 4, generator=g, dtype=torch.float64)
    draws = {
        "e": e,
        "time_normals": torch.randn(8, 2, generator=g, dtype=torch.float64),
        "drop_uniforms": torch.rand(8, generator=g),
        "omega_uniforms": torch.rand(8, generator=g, dtype=torch.float64),
        "interval_uniforms": torch.rand(8, 2, generator=g, dtype=torch.float64),
    }
    assert draws.keys() | {"posterior_noise"} == RECIPE.draws((3, 4, 4)).keys()
    seen = dict.fromkeys(("blocks", "u_blocks", "v_blocks"), 0)

    def count(name):
        def hook(_, inputs):
            has_tangent = inputs[-1] is not None
            seen[name] += len(inputs[0]) * (1 + has_tangent)

        return hook

    for name in seen:
        for block in getattr(net, name):
            block.register_forward_pre_hook(count(name))
    y = torch.zeros(8, dtype=torch.int64)
    loss, _ = ImfLoss(net, RECIPE)(x, y, draws, torch.tensor(0.0))
    assert loss.isfinite()
    shared = len(net.blocks)
    assert seen == {"blocks": shared * (8 + 4 + 2 * 4 + 8), "u_blocks": 2 * 4 + 8, "v_blocks": 8 + 4 + 8}


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_omega_has_the_density_of_its_power(exponent):
    """The share of draws below w is the integral of omega^-exponent, here by the midpoint rule."""
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    omega, grid = sample_omega(u, 8.0, exponent), torch.linspace(1, 8, 70_001, dtype=torch.float64)
    assert omega.min() >= 1 and omega.max() <= 8
    density = ((grid[1:] + grid[:-1]) / 2) ** -exponent
    for w in (1.5, 2.0, 4.0, 7.0):
        share = density[grid[1:] <= w + 1e-9].sum() / density.sum()
        assert (omega <= w).double().mean().item() == pytest.approx(share.item(), abs=2e-4)


def test_intervals_contain_one_half_and_are_whole_for_r_equals_t():
    start, end = sample_interval(torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)), 10)
    assert (start[:10] == 0).all() and (end[:10] == 1).all()
    assert start.min() >= 0 and start.max() < 0.5 <= end[10:].min() and end[10:].max() < 1
    assert start[10:].std().item() == pytest.approx(0.5 / 12**0.5, rel=0.05)
    assert torch.corrcoef(torch.stack([start[10:], end[10:]]))[0, 1].abs() < 0.1
