"""The pictures of tools/study/toy_flow.py."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from toy_field import marginal_velocity, sample_data, trajectory  # noqa: E402

NOISE, DATA, PATH = "#8a8f98", "#c8451b", "#2b6cb0"


def plane(axis, title: str) -> None:
    axis.set(xlim=(-3.7, 3.7), ylim=(-3.7, 3.7), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title, fontsize=11)


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_fields(path: Path) -> None:
    """The straight conditional paths, the marginal velocity between noise and data, and its curved trajectories."""
    g = torch.Generator().manual_seed(3)
    x, e = sample_data(60, g), torch.randn(60, 2, dtype=torch.float64, generator=g)
    ends = torch.ones(60).double(), torch.zeros(60).double()
    lines = trajectory(e, *ends)
    figure, axes = plt.subplots(1, 3, figsize=(14.4, 4.9), gridspec_kw={"wspace": 0.05})
    plane(axes[0], "lines from e to x: straight, they cross")
    plane(axes[1], "field: -v(z, t) at t = 0.4")
    plane(axes[2], "trajectories of v: curved, they do not cross")
    axes[0].plot(*torch.stack([e, x]).unbind(2), color=PATH, lw=0.7, alpha=0.6)
    draw_arrows(axes[1], 0.4)
    axes[2].plot(*lines.unbind(2), color=PATH, lw=0.7, alpha=0.8)
    for axis, end in zip(axes[::2], (x, lines[-1]), strict=True):
        axis.scatter(*e.T, s=9, color=NOISE, label="noise, t = 1", zorder=3)
        axis.scatter(*end.T, s=9, color=DATA, label="data, t = 0", zorder=3)
    axes[0].legend(loc="lower left", fontsize=8, frameon=False)
    save(figure, path)


def draw_arrows(axis, t: float) -> None:
    """Arrows of -v(z, t), the direction of motion as time falls, in front of the data."""
    side = torch.linspace(-3, 3, 19, dtype=torch.float64)
    z = torch.cartesian_prod(side, side)
    v = marginal_velocity(z, torch.full((len(z),), t, dtype=torch.float64))
    axis.quiver(*z.T, *-v.T, color=PATH, width=0.0035, scale=60)
    axis.scatter(*sample_data(600, torch.Generator().manual_seed(4)).T, s=3, color=DATA, alpha=0.15, zorder=0)


def draw_secant(path: Path) -> None:
    """On single trajectories: the tangent v(z_t, t), followed for the whole time, against the secant u(z_t, 0, t)."""
    starts = torch.tensor([[0.35, 0.5], [-0.9, -0.15], [1.1, -0.6]], dtype=torch.float64)
    one, zero = torch.ones(3).double(), torch.zeros(3).double()
    lines = trajectory(starts, one, zero)
    v = marginal_velocity(starts, one)
    figure, axis = plt.subplots(figsize=(5.6, 5.6))
    plane(axis, "one step from noise: along the tangent or along the secant")
    for i in range(3):
        axis.plot(*lines[:, i].T, color=PATH, lw=1.6, label="trajectory" if i == 0 else None)
        for end, color, label in ((starts[i] - v[i], NOISE, "z - v(z, 1)"), (lines[-1, i], DATA, "z - u(z, 0, 1)")):
            axis.annotate(
                "", end.tolist(), starts[i].tolist(), arrowprops={"arrowstyle": "->", "color": color, "lw": 1.6}
            )
            axis.plot([], [], color=color, label=label if i == 0 else None)
    axis.scatter(*starts.T, s=24, color="black", zorder=3, label="z, noise")
    cloud = sample_data(600, torch.Generator().manual_seed(4))
    axis.scatter(*cloud.T, s=3, color=DATA, alpha=0.15, zorder=0)
    axis.legend(loc="lower left", fontsize=8, frameon=False)
    save(figure, path)


def draw_samples(path: Path, results: dict[str, tuple[Tensor, float]]) -> None:
    """One-step samples by rule with their distance to the truth; for the truth, that to as many other true points."""
    figure, axes = plt.subplots(1, len(results), figsize=(3.1 * len(results), 3.4))
    for axis, (name, (points, distance)) in zip(axes, results.items(), strict=True):
        plane(axis, f"{name}\nW2 {distance:.2f}")
        axis.scatter(*points.T, s=2, alpha=0.4, color=DATA if name == "truth" else PATH)
    save(figure, path)
