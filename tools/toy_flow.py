"""Why average velocity: three small networks on a mixture in the plane whose flow is known in closed form.

    python tools/toy_flow.py                         # some minutes; pictures into docs/
    python tools/toy_flow.py --steps 300 --out /tmp/toy

The same network, data, noise and times (r, t) train by three rules: flow matching (r = t, target e - x), direct
regression (target e - x for every r), and MeanFlow (mf_dist's own loss). Each then makes samples in one step, and its
u(z, r, t) is held against the integral of the closed-form velocity. docs/why_average_velocity.md explains.
"""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn
from toy_field import average_velocity, sample_data

from mf_dist.config import MeanFlowConfig
from mf_dist.errors import UserError, command_line
from mf_dist.meanflow.loss import meanflow_loss
from mf_dist.meanflow.times import sample_times
from mf_dist.models.layers import Linear, silu
from mf_dist.progress import progress

RULES = ("flow matching", "direct regression", "MeanFlow")
# The plain squared loss: the recipe's weight 1 / (s + eps) makes the minimiser seek modes instead of the mean, which is
# harmless where s sums thousands of numbers and ruins a plane. Wider times reach the ends.
RECIPE = MeanFlowConfig(share_r_equals_t=Fraction(1, 2), label_drop=0.0, adaptive_p=0.0, time_mean=0.0, time_std=2.0)
BATCH, WIDTH = 512, 192


class PlaneNet(nn.Module):
    """u(z, r, t) in the plane: z (B, 2, 1, 1), with a tangent as the DiT has; labels are ignored."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(a, b) for a, b in ((4, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 2)))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, z, r, t, y, tangent=None):
        def joined(z, r, t):
            return torch.cat([z.flatten(1), t[:, None], (t - r)[:, None]], dim=1)

        h, dh = self.layers[0](joined(z, r, t), None if tangent is None else joined(*tangent))
        for layer in self.layers[1:]:
            h, dh = layer(*silu(h, dh))
        return h.view_as(z) if dh is None else (h.view_as(z), dh.view_as(z))


def loss_of(rule: str, net: PlaneNet, x: Tensor, e: Tensor, normals: Tensor) -> Tensor:
    """One batch, r = t on the first half of the rows; flow matching takes r = t on all."""
    n_eq = len(x) if rule == "flow matching" else len(x) // 2
    r, t = sample_times(normals, n_eq, RECIPE.time_mean, RECIPE.time_std)
    y = torch.zeros(len(x), dtype=torch.long)
    if rule != "direct regression":
        return meanflow_loss(net, x, e, r, t, y, n_eq, 0, RECIPE)[0]
    z = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * e
    s = (net(z, r, t, y) - (e - x)).square().sum(dim=(1, 2, 3))
    return (s / (s.detach() + RECIPE.adaptive_eps) ** RECIPE.adaptive_p).mean()


def train(rule: str, steps: int, seed: int) -> PlaneNet:
    """The same initial weights and the same draws for every rule."""
    g = torch.Generator().manual_seed(seed)
    net = PlaneNet(g)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with progress(steps, "step", rule) as bar:
        for _ in range(steps):
            x = sample_data(BATCH, g).float()[:, :, None, None]
            e, normals = torch.randn(x.shape, generator=g), torch.randn(BATCH, 2, generator=g)
            optimizer.zero_grad()
            loss_of(rule, net, x, e, normals).backward()
            optimizer.step()
            schedule.step()
            bar.update(1)
    return net


@torch.no_grad()
def u_of(net: PlaneNet, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """z (B, 2) fp64 -> (B, 2) fp64."""
    return net(z.float()[:, :, None, None], r.float(), t.float(), None)[:, :, 0, 0].double()


def wasserstein(a: Tensor, b: Tensor) -> float:
    """The 2-Wasserstein distance between two sets of equally many points, exact, by optimal assignment."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a, b).square().numpy()
    return float(cost[linear_sum_assignment(cost)].mean() ** 0.5)


def compare(nets: dict[str, PlaneNet], count: int, seed: int) -> dict[str, tuple[Tensor, float, float]]:
    """rule -> one-step samples, their distance to the truth, and the relative error of u against the integral, where z
    follows the marginal trajectories and r < t are drawn as in training."""
    g = torch.Generator().manual_seed(seed + 1)
    noise, truth = torch.randn(count, 2, dtype=torch.float64, generator=g), sample_data(count, g)
    other = sample_data(count, g)
    r, t = (a.double() for a in sample_times(torch.randn(count, 2, generator=g), 0, RECIPE.time_mean, RECIPE.time_std))
    z = (1 - t)[:, None] * sample_data(count, g) + t[:, None] * torch.randn(count, 2, dtype=torch.float64, generator=g)
    exact, one, zero = average_velocity(z, r, t), torch.ones(count).double(), torch.zeros(count).double()
    half_step = average_velocity(z, r, t, steps=400)
    print(f"the integral itself: halving its step changes it by {relative(exact, half_step):.1e}; "
          f"two sets of {count} real points are {wasserstein(truth, other):.3f} apart")  # fmt: skip
    found = {
        "truth": (truth, 0.0, 0.0),
        "exact average velocity": (noise - average_velocity(noise, zero, one), 0.0, 0.0),
    }
    for rule, net in nets.items():
        start = one if rule == "flow matching" else zero  # it knows r = t alone
        samples = noise - u_of(net, noise, start, one)
        where = t if rule == "flow matching" else r
        found[rule] = (samples, wasserstein(samples, truth), relative(u_of(net, z, where, t), exact))
        print(f"{rule:18} one-step samples {found[rule][1]:.3f} from real points (W2), "
              f"u off by {100 * found[rule][2]:.1f} % of its size")  # fmt: skip
    return found


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for toy_*.png (default docs)")
    parser.add_argument("--steps", type=int, default=4000, help="training steps of each network (default 4000)")
    parser.add_argument("--points", type=int, default=2000, help="samples to compare (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or args.points < 2:
        raise UserError("--steps must be at least 1 and --points at least 2")
    torch.set_num_threads(1)
    from toy_pictures import draw_fields, draw_samples, draw_secant

    args.out.mkdir(parents=True, exist_ok=True)
    nets = {rule: train(rule, args.steps, args.seed) for rule in RULES}
    found = compare(nets, args.points, args.seed)
    draw_fields(args.out / "toy_paths.png")
    draw_secant(args.out / "toy_secant.png")
    draw_samples(args.out / "toy_samples.png", found)
    print(f"pictures: {args.out}/toy_paths.png, toy_secant.png, toy_samples.png")


if __name__ == "__main__":
    sys.exit(main())
