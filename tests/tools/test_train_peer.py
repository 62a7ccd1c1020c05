"""Training with another project's loss: the authors' form trains the same network, and a foreign loss module is called
as its project calls it."""

import pytest
import torch
import train_peer
from conftest import run_here, run_python
from oracles import random_batch, small_dit

from mf_dist.checkpoint.reader import find_checkpoint
from mf_dist.config.objectives import ImfConfig, MeanFlowConfig
from mf_dist.objectives.meanflow import MeanFlowLoss
from mf_dist.runtime.errors import UserError
from mf_dist.sampling.generator import load_trained_model

NULL = 3
LOSS = """
import torch

class SILoss:
    def __init__(self, weighting, time_mu, time_sigma, ratio_r_not_equal_t, adaptive_p, label_dropout_prob, cfg_omega,
                 cfg_kappa, cfg_min_t, cfg_max_t):
        assert weighting == "adaptive" and (time_mu, time_sigma, ratio_r_not_equal_t) == (-0.4, 1.0, 0.25)
        assert (adaptive_p, label_dropout_prob, cfg_omega, cfg_kappa) == (1.0, 0.1, 1.0, 0.5)
        assert (cfg_min_t, cfg_max_t) == (0.0, 1.0)

    def __call__(self, model, images, model_kwargs):
        assert model.module.num_classes == 3
        u = model(images + torch.randn_like(images), torch.zeros(len(images)), torch.rand(len(images)), **model_kwargs)
        rows = u.square().sum(dim=(1, 2, 3))
        return rows, rows.mean()
"""


def step(loss_class, net, seed=1):
    """Loss and gradients of a batch of 16 with the draws of `seed`."""
    x, e, *_, y = random_batch(NULL, 16, 12, 0, dropped=())
    g = torch.Generator().manual_seed(seed)
    draws = {
        "time_normals": torch.randn(16, 2, generator=g, dtype=x.dtype),
        "drop_uniforms": torch.rand(16, generator=g, dtype=x.dtype),
        "e": torch.randn(x.shape, generator=g, dtype=torch.float32),
    }
    if loss_class not in (MeanFlowLoss, train_peer.AuthorsLoss):
        x, net = x.float(), net.float()
    loss, sums = train_peer.build(loss_class, net, MeanFlowConfig(kappa=0.5))(x, y, draws, torch.zeros(()))
    assert sums["loss"][0] / sums["loss"][1] == pytest.approx(loss.item(), rel=1e-5)
    return loss, torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)


def test_the_authors_form_has_our_loss_and_gradient_on_the_same_network():
    net = small_dit()
    loss, gradients = step(train_peer.AuthorsLoss, net)
    expected_loss, expected = step(MeanFlowLoss, net)
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-6)  # the peers' LayerNorm computes in fp32
    for gradient, of_ours in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, of_ours, atol=1e-6, rtol=1e-3)


def test_a_foreign_loss_gets_the_network_and_draws_that_follow_the_step(tmp_path):
    (tmp_path / "loss.py").write_text(LOSS)
    loss_class = train_peer.loss_of(str(tmp_path / "loss.py"))
    net = small_dit()
    loss, gradients = step(loss_class, net)
    again, other = step(loss_class, net)[0], step(loss_class, net, seed=2)[0]
    assert loss == again != other
    assert sum(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients) > 10


@pytest.mark.dist
def test_a_run_with_the_authors_form_ends_with_the_weights_of_ours(tiny_config, tmp_path):
    weights = {}
    for name, program in (("ours", ["-m", "mf_dist.train"]), ("peer", ["tools/study/train_peer.py", "authors"])):
        run_python(*program, tiny_config, f"run_dir={tmp_path / name}", "log.sample_every_images=0")
        model = load_trained_model(find_checkpoint(tmp_path / name), None, None, torch.device("cpu"))
        weights[name] = model.generator.net.state_dict()
    for key, ours in weights["ours"].items():
        torch.testing.assert_close(weights["peer"][key], ours, atol=2e-4, rtol=1e-3)


def test_what_is_no_peer_is_one_line(tiny_config, tmp_path):
    (tmp_path / "other.py").touch()
    for arguments, text in (
        ((tmp_path / "loss.py", tiny_config), f"no peer {tmp_path / 'loss.py'}: expected `authors` or the path of"),
        ((tiny_config,), f"no peer {tiny_config}: expected"),
        ((tmp_path / "other.py", tiny_config), "other.py has no SILoss"),
    ):
        _, error = run_here("tools/study/train_peer.py", *arguments, expect=2)
        assert error.count("\n") == 1 and text in error
    for objective in (ImfConfig(), MeanFlowConfig(tangent="boundary"), MeanFlowConfig(gap_weight="progress")):
        with pytest.raises(UserError, match="the peers compute MeanFlow's loss alone"):
            train_peer.build(train_peer.AuthorsLoss, None, objective)
