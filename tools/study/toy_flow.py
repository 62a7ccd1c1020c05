"""Why average velocity: three small networks on a mixture in the plane whose flow is known in closed form.

    python tools/study/toy_flow.py                                      # a few minutes; pictures go to docs/
    python tools/study/toy_flow.py --steps 300 --seeds 1 --out /tmp/toy
    python tools/study/toy_flow.py --adaptive-p 1 --out /tmp/weighted   # the recipe's weight, which fails in a plane

The same network, data, noise and times (r, t) train by three rules: flow matching (r = t, target e - x), direct
regression (target e - x for every r), and MeanFlow (mf_dist's own loss). Each then makes samples in one step, and its
u(z, r, t) is compared with the integral of the closed-form velocity; docs/why_average_velocity.md explains the results.
The pictures show the first seed.
"""

import argparse
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from toy_field import STD, average_velocity, means, sample_data

from mf_dist.config.objectives import MeanFlowConfig
from mf_dist.models.layers import Linear, silu
from mf_dist.objectives.meanflow import meanflow_loss
from mf_dist.objectives.times import sample_times
from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path
from mf_dist.runtime.progress import progress

RULES = ("flow matching", "direct regression", "MeanFlow")
# The plain squared loss: the recipe's weight 1 / (s + eps) makes the minimiser seek modes instead of the mean, which is
# harmless where s sums thousands of numbers but not in two dimensions. The wider time distribution reaches 0 and 1.
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


def loss_of(rule: str, net: PlaneNet, x: Tensor, e: Tensor, normals: Tensor, recipe: MeanFlowConfig) -> Tensor:
    """One batch, r = t on the first half of the rows; flow matching takes r = t on all."""
    n_eq = len(x) if rule == "flow matching" else len(x) // 2
    r, t = sample_times(normals, n_eq, recipe.time_mean, recipe.time_std)
    y = torch.zeros(len(x), dtype=torch.long)
    if rule != "direct regression":
        return meanflow_loss(net, x, e, r, t, y, n_eq, 0, recipe)[0]
    z = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * e
    s = (net(z, r, t, y) - (e - x)).square().sum(dim=(1, 2, 3))
    return (s / (s.detach() + recipe.adaptive_eps) ** recipe.adaptive_p).mean()


def train(rule: str, steps: int, seed: int, recipe: MeanFlowConfig = RECIPE) -> PlaneNet:
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
            loss_of(rule, net, x, e, normals, recipe).backward()
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


def off_modes(samples: Tensor) -> float:
    """Share of the samples farther than three deviations from every mode: exp(-4.5) = 1.1 % of the true density."""
    return (torch.cdist(samples, means()).amin(1) > 3 * STD).double().mean().item()


class Measured(NamedTuple):
    """One-step samples (N, 2), their W2 distance to the truth, share off the modes, and the relative error of u."""

    samples: Tensor
    distance: float
    off: float
    error: float


def compare(nets: dict[str, PlaneNet], count: int, seed: int) -> dict[str, Measured]:
    """Measures each rule, and the exact average velocity, against the truth. u is compared at points of the conditional
    lines, distributed like those of the marginal trajectories, with r < t drawn as in training."""
    g = torch.Generator().manual_seed(seed + 1)
    noise, truth = torch.randn(count, 2, dtype=torch.float64, generator=g), sample_data(count, g)
    other = sample_data(count, g)
    r, t = (a.double() for a in sample_times(torch.randn(count, 2, generator=g), 0, RECIPE.time_mean, RECIPE.time_std))
    z = (1 - t)[:, None] * sample_data(count, g) + t[:, None] * torch.randn(count, 2, dtype=torch.float64, generator=g)
    exact, one, zero = average_velocity(z, r, t), torch.ones(count).double(), torch.zeros(count).double()
    print(f"the integral itself: halving its step changes it by {relative(exact, average_velocity(z, r, t, 400)):.1e}")
    ideal = noise - average_velocity(noise, zero, one)
    results = {
        "truth": Measured(truth, wasserstein(other, truth), off_modes(truth), 0.0),
        "exact average velocity": Measured(ideal, wasserstein(ideal, truth), off_modes(ideal), 0.0),
    }
    for rule, net in nets.items():
        r_sample, r_error = (one, t) if rule == "flow matching" else (zero, r)  # flow matching is trained at r = t only
        samples, error = noise - u_of(net, noise, r_sample, one), relative(u_of(net, z, r_error, t), exact)
        results[rule] = Measured(samples, wasserstein(samples, truth), off_modes(samples), error)
    return results


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def table(results: list[dict[str, Measured]]) -> str:
    """A line per rule: mean over the seeds, with the smallest and the largest."""

    def cell(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
        low, middle, high = (f"{scale * a:.{digits}f}" for a in (min(values), mean(values), max(values)))
        return f"{middle} ({low} to {high})"

    lines = ["| one-step samples of | distance (W2) | off the modes, % | u off by, % |", "|---|---|---|---|"]
    for name in results[0]:
        rows = [result[name] for result in results]
        cells = cell([m.distance for m in rows]), cell([m.off for m in rows], 100, 1)
        error = cell([m.error for m in rows], 100, 0) if any(m.error for m in rows) else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {error} |")
    return "\n".join(lines)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=expanded_path, default=Path("docs"), help="folder for toy_*.png (default docs)")
    parser.add_argument("--steps", type=int, default=4000, help="training steps of each network (default 4000)")
    parser.add_argument("--points", type=int, default=2000, help="samples to compare (default 2000)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of everything (default 3)")
    parser.add_argument(
        "--adaptive-p", type=float, default=RECIPE.adaptive_p, help="exponent of the loss's weight (default 0)"
    )
    args = parser.parse_args()
    if args.steps < 1 or args.points < 2 or args.seeds < 1 or args.adaptive_p < 0:
        raise UserError("--steps and --seeds must be at least 1, --points at least 2 and --adaptive-p at least 0")
    torch.set_num_threads(1)
    from toy_pictures import draw_fields, draw_samples, draw_secant

    args.out.mkdir(parents=True, exist_ok=True)
    recipe = replace(RECIPE, adaptive_p=args.adaptive_p)
    results = [
        compare({rule: train(rule, args.steps, seed, recipe) for rule in RULES}, args.points, seed)
        for seed in range(args.seeds)
    ]
    print(table(results))
    draw_fields(args.out / "toy_paths.png")
    draw_secant(args.out / "toy_secant.png")
    draw_samples(args.out / "toy_samples.png", {name: (m.samples, m.distance) for name, m in results[0].items()})
    print(f"pictures: {args.out}/toy_paths.png, toy_secant.png, toy_samples.png")


if __name__ == "__main__":
    sys.exit(main())
