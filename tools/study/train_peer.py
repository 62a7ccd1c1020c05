"""Trains like `python -m mf_dist.train`, in one process, but with the MeanFlow loss as another project computes it.

    python tools/study/train_peer.py authors configs/fashion_cpu.yaml run_dir=runs/authors
    python tools/study/train_peer.py meanflow/loss.py configs/fashion_cpu.yaml run_dir=runs/zhuyu

The first argument is `authors` (the authors' form: torch.func.jvp over the whole batch) or loss.py of
https://github.com/zhuyu-cs/MeanFlow, which is not part of this project; tried at commit 04d183c. The network is a DiT
of torch's own layers with the same weights, so that torch.func.jvp can pass it; data, optimizer, EMA and checkpoints
are those of any run. tools/study/compare.py runs this script.
"""

import argparse
import importlib.util
import sys
from functools import cache, partial
from pathlib import Path

import torch

from mf_dist.config.objectives import MeanFlowConfig
from mf_dist.objectives.base import log_sums
from mf_dist.objectives.guidance import drop_labels
from mf_dist.objectives.meanflow import MeanFlowLoss
from mf_dist.objectives.times import sample_times
from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path
from mf_dist.train import main as train
from mf_dist.training import trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from bench_peers import authors, plain_like  # noqa: E402


@cache
def plain(net):
    """The same network of torch's own layers; its parameters are those of `net`, not copies."""
    same = plain_like(net)
    same.load_state_dict(net.state_dict(keep_vars=True), assign=True)
    return same


class AuthorsLoss(MeanFlowLoss):
    """From the same draws as ours."""

    def forward(self, x, y, draws, schedule):
        recipe, n_eq = self.recipe, self.num_r_equals_t(len(x))
        r, t = sample_times(draws["time_normals"], n_eq, recipe.time_mean, recipe.time_std)
        y = drop_labels(y, draws["drop_uniforms"], n_eq, recipe.label_drop, self.null_label)
        loss = authors(plain(self.net), x, draws["e"], r, t, y, n_eq, self.null_label, recipe)
        return loss, log_sums(loss=(loss.detach() * len(x), len(x)))


class Wrapped:
    """The network as zhuyu-cs's loss calls it: in a wrapper of data parallelism, y by its name."""

    def __init__(self, net):
        self.net, self.module, self.num_classes = net, self, net.null_label

    def __call__(self, z, r, t, y):
        return self.net(z, r, t, y)


class ZhuyuLoss(MeanFlowLoss):
    """Their SILoss with the settings of our recipe. It draws noise, times and dropped labels itself, from torch's own
    generator: seeded by the step's draws."""

    loss_class: type

    def forward(self, x, y, draws, schedule):
        recipe = self.recipe
        their_loss = self.loss_class(
            weighting="adaptive",
            time_mu=recipe.time_mean,
            time_sigma=recipe.time_std,
            ratio_r_not_equal_t=float(1 - recipe.share_r_equals_t),
            adaptive_p=recipe.adaptive_p,
            label_dropout_prob=recipe.label_drop,
            cfg_omega=recipe.omega,
            cfg_kappa=recipe.kappa,
            cfg_min_t=recipe.guidance_start,
            cfg_max_t=recipe.guidance_end,
        )
        net = Wrapped(plain(self.net))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draws["e"].flatten()[0].view(torch.int32).item())
            rows, _ = their_loss(net, x, {"y": y})
        loss = rows.mean()
        return loss, log_sums(loss=(loss.detach() * len(x), len(x)))


def loss_of(peer):
    """The subclass for a first argument. Raises UserError if it is no such file."""
    if peer == "authors":
        return AuthorsLoss
    path = Path(expanded_path(peer))
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"no peer {peer}: expected `authors` or the path of zhuyu-cs/MeanFlow's loss.py")
    spec = importlib.util.spec_from_file_location("zhuyu_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "SILoss"):
        raise UserError(f"{peer} has no SILoss: expected the path of zhuyu-cs/MeanFlow's loss.py")
    return type("ZhuyuLoss", (ZhuyuLoss,), {"loss_class": module.SILoss})


def build(loss, net, objective):
    """In place of objectives.build.build_loss. Raises UserError for what the peers do not compute."""
    if not isinstance(objective, MeanFlowConfig) or (objective.tangent, objective.gap_weight) != ("guided", "uniform"):
        raise UserError("the peers compute MeanFlow's loss alone: give a config of it, without tangent or gap_weight")
    return loss(net, objective)


@command_line
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("peer", help="authors, or the path of zhuyu-cs/MeanFlow's loss.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of python -m mf_dist.train")
    args = parser.parse_args()
    trainer.build_loss = partial(build, loss_of(args.peer))
    sys.argv[1:] = args.arguments
    return train()


if __name__ == "__main__":
    sys.exit(main())
