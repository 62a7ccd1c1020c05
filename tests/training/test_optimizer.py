"""AdamW compared with torch's, and its EMAs with the closed form."""

import pytest
import torch

from mf_dist.config.schema import OptimConfig
from mf_dist.training.optimizer import PIECE, AdamWEma, ema_decay_after


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_adamw(weight_decay):
    g = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=g, dtype=torch.float64)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    config = OptimConfig(lr=1e-2, weight_decay=weight_decay)
    a = AdamWEma([ours], config)
    b = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    for _ in range(20):
        grad = torch.randn(50, generator=g, dtype=torch.float64)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.6, 0.3])
def test_each_ema_is_the_weighted_sum_of_all_weights(warmup, decay):
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(20, generator=g, dtype=torch.float64))
    optimizer = AdamWEma([p], OptimConfig(lr=0.1, ema_decay=(0.6, 0.3), ema_warmup=warmup))
    history = [p.detach().clone()]
    for _ in range(12):
        p.grad = torch.randn(20, generator=g, dtype=torch.float64)
        optimizer.step()
        history.append(p.detach().clone())
    decays = [min(decay, (1 + n) / (10 + n)) if warmup else decay for n in range(1, 13)]
    expected, weight = torch.zeros(20, dtype=torch.float64), 1.0
    for d, weights in zip(reversed(decays), reversed(history[1:]), strict=True):
        expected += weight * (1 - d) * weights
        weight *= d
    expected += weight * history[0]
    torch.testing.assert_close(optimizer.state[p][f"ema-{decay}"], expected, atol=1e-12, rtol=1e-12)


def test_warmup_reaches_the_decay():
    assert ema_decay_after(1, 0.999, True) == 2 / 11
    assert ema_decay_after(10_000, 0.999, True) == 0.999
    assert ema_decay_after(1, 0.999, False) == 0.999


def test_factor_scales_the_gradient_and_0_skips_the_step():
    factors = iter([1.0, 0.0, 0.5])
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    with_factors, plain = AdamWEma([p], OptimConfig(), lambda: next(factors)), AdamWEma([q], OptimConfig())
    for grad in (1.0, 7.0, 2.0):
        p.grad = torch.full((3,), grad)
        with_factors.step()
    for grad in (1.0, 1.0):
        q.grad = torch.full((3,), grad)
        plain.step()
    assert torch.equal(p, q)
    assert all(torch.equal(a, plain.state[q][name]) for name, a in with_factors.state[p].items())


def plain_update(p, grad, exp_avg, exp_avg_sq, ema, n, config):
    """One operation after the other on whole tensors."""
    exp_avg.lerp_(grad, 1 - config.beta1)
    exp_avg_sq.mul_(config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
    root = (exp_avg_sq / (1 - config.beta2**n)).sqrt_().add_(config.eps)
    p.mul_(1 - config.lr * config.weight_decay)
    p.addcdiv_(exp_avg, root, value=-config.lr / (1 - config.beta1**n))
    ema.lerp_(p, 1 - ema_decay_after(n, config.ema_decay[0], config.ema_warmup))


@pytest.mark.parametrize("compiles", [False, True])
def test_one_pass_gives_the_numbers_of_one_operation_after_the_other(compiles):
    """In fp32: to the last bit in pieces of a CPU's cache, to two units in the last place where operations are fused
    (of the operands: that of a sum in which they cancel is smaller). A step compiles nothing new."""
    from torch._dynamo.utils import counters

    config = OptimConfig(lr=1e-2, weight_decay=0.1, ema_warmup=True)
    size = 2 * PIECE + 77
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(size, generator=g))
    optimizer, graphs = AdamWEma([p], config, lambda: 0.5, compiles), set()
    for n in range(1, 4):
        if p in optimizer.state:
            before = [optimizer.state[p][name].clone() for name in optimizer.states]
        else:
            before = [torch.zeros(size), torch.zeros(size), p.detach().clone()]
        start, before = p.detach().clone(), [a.clone() for a in before]
        expected = [start.clone(), *(a.clone() for a in before)]
        p.grad = torch.randn(size, generator=g)
        plain_update(expected[0], p.grad * 0.5, *expected[1:], n, config)
        optimizer.step()
        graphs.add(counters["stats"]["unique_graphs"])
        ours = [p.detach(), *(optimizer.state[p][name] for name in optimizer.states)]
        updates = [config.lr, 0, 0, config.lr]  # what is added to weights and EMA at most, of p, the moments, the EMA
        for a, b, old, update in zip(ours, expected, [start, *before], updates, strict=True):
            if compiles:
                assert ((a - b).abs() <= 2**-22 * (b.abs() + old.abs() + update)).all()
            else:
                assert torch.equal(a, b)
    assert len(graphs) == 1
