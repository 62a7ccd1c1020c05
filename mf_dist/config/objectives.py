"""What a run optimises: one dataclass per objective, each a section of the config, with what other parts of the program
must know of it. The losses are in mf_dist/objectives. No torch.

Progress is samples_seen / train.total_images, in [0, 1].
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import ClassVar, Literal, NamedTuple

from mf_dist.config.fields import NotNegative, Positive, RowShare, Share
from mf_dist.runtime.errors import UserError


class Draw(NamedTuple):
    """Random numbers of one training row: N(0, 1) or U[0, 1), fp32."""

    law: Literal["normal", "uniform"]
    shape: tuple[int, ...]


class Curve(NamedTuple):
    """How the report shows a logged quantity; those of one title share a chart."""

    title: str
    unit: str
    label: str = ""
    is_log: bool = False


class Phase(NamedTuple):
    """A part of a run in which every step is the same graph."""

    name: str
    """For the log; empty if the run has one phase."""
    begin: float
    """Progress at which it begins."""
    forwards: float
    """Cost of its step per image, in forward passes of the network."""
    more_in_bf16: float = 0.0
    """Further forward passes where the layers compute in bf16: those that repeat in fp32 what rounding would spoil."""

    def cost(self, in_bf16: bool) -> float:
        """All forward passes of its step, per image."""
        return self.forwards + in_bf16 * self.more_in_bf16


@dataclass(frozen=True)
class Objective(ABC):
    """What all objectives state. Fields have the same meaning in each; their defaults are those of the paper."""

    SECOND_HEAD_PASSES: ClassVar[float] = 0.0
    """Passes per image of the network's second head beside the first, in forward passes of that head."""
    NETWORKS: ClassVar[tuple[str, ...]] = ("dit",)
    """Values of model.network that it can train."""
    SUMS: ClassVar[dict[str, Curve | None]] = {
        "raw_loss_r_equals_t": Curve("Raw loss", "per row, sum over C, H, W", "r = t", is_log=True),
        "raw_loss_r_below_t": Curve("Raw loss", "per row, sum over C, H, W", "r < t", is_log=True),
        "loss": None,
        "v_loss": Curve("v-loss", "of u(z, t, t) against v", is_log=True),
    }
    """Quantities that the loss logs, means per row; None: not in the report."""

    share_r_equals_t: RowShare = Fraction(3, 4)
    """Exact share of rows with r = t (1: plain flow matching); a micro-batch is a multiple of its denominator."""

    def draws(self, latent: tuple[int, int, int]) -> dict[str, Draw]:
        """What is drawn for a row, in this order, which determines every run's numbers; latent: (C, S, S)."""
        return {
            "time_normals": Draw("normal", (2,)),
            "drop_uniforms": Draw("uniform", ()),
            "posterior_noise": Draw("normal", latent),
            "e": Draw("normal", latent),
        }

    @property
    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """In order; the first begins at 0."""

    def phase(self, progress: float) -> Phase:
        return [phase for phase in self.phases if phase.begin <= progress][-1]

    def schedule(self, progress: float) -> float:
        """The number that the loss takes from the schedule at this progress."""
        return 0.0

    @property
    def follows_progress(self) -> bool:
        """Whether the loss changes with progress, hence with train.total_images."""
        return True

    def forwards(self, in_bf16: bool) -> float:
        """Mean cost of a step over the run, per image, in forward passes F."""
        ends = [phase.begin for phase in self.phases[1:]] + [1.0]
        return sum((end - phase.begin) * phase.cost(in_bf16) for phase, end in zip(self.phases, ends, strict=True))

    @property
    def is_flow(self) -> bool:
        """Whether only rows with r = t are trained: the network then knows velocities, not averages, and is sampled by
        Euler steps."""
        return self.share_r_equals_t == 1

    @property
    def sampler(self) -> Literal["meanflow", "restart", "euler"]:
        """How its network is sampled in several steps (objectives/sampler.py)."""
        return "euler" if self.is_flow else "meanflow"

    @property
    @abstractmethod
    def guided(self) -> bool:
        """Whether the target contains classifier-free guidance."""

    @abstractmethod
    def check(self, section: str, num_classes: int) -> None:
        """Raises UserError for values that contradict each other; section: its name in the config."""


@dataclass(frozen=True)
class Guided(Objective):
    """The guided velocity of MeanFlow, v_g = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null)."""

    omega: float = 1.0
    """Guidance: weight of v; the effective scale is omega / (1 - kappa)."""
    kappa: float = 0.0
    """Guidance: weight of u(z, t, t | y)."""
    label_drop: Share = 0.1
    """Share of ALL rows whose label becomes the null class."""

    @property
    def guided(self) -> bool:
        return (self.omega, self.kappa) != (1.0, 0.0)

    @property
    def guidance_forwards(self) -> float:
        """u(z, t, t | null) on every row and, if kappa > 0, u(z, t, t | y) on the r < t rows; on the others it is the
        regression's own."""
        return (1 + (self.below if self.kappa else 0)) if self.guided else 0

    @property
    def below(self) -> float:
        """Share of rows with r < t."""
        return 1 - float(self.share_r_equals_t)

    def check(self, section: str, num_classes: int) -> None:
        if self.kappa >= 1:
            raise UserError(f"{section}.kappa {self.kappa} must be below 1: the scale is omega / (1 - kappa)")
        if self.guided and self.label_drop == 0 and self.omega + self.kappa != 1:
            raise UserError(f"guidance needs the null class, which {section}.label_drop=0 never trains: set it above 0")
        if self.guided and num_classes == 0:
            raise UserError(
                f"guidance needs classes, but the dataset has none: set {section}.omega=1 and {section}.kappa=0"
            )


@dataclass(frozen=True)
class GuidedInInterval(Guided):
    guidance_start: Share = 0.0
    """Guidance applies for guidance_start <= t <= guidance_end; outside, v_g = v."""
    guidance_end: Share = 1.0
    time_mean: float = -0.4
    """Mean of the normal under the logit-normal times."""
    time_std: Positive = 1.0
    """Standard deviation of the normal under the logit-normal times."""

    def check(self, section: str, num_classes: int) -> None:
        super().check(section, num_classes)
        if self.guidance_start > self.guidance_end:
            raise UserError(f"{section}.guidance_start {self.guidance_start} is above guidance_end {self.guidance_end}")


@dataclass(frozen=True)
class MeanFlowConfig(GuidedInInterval):
    """MeanFlow (arXiv 2505.13447): the target by a Jacobian-vector product. Defaults: Table 4 and the authors' code."""

    SUMS: ClassVar[dict[str, Curve | None]] = {**Objective.SUMS, "du_dt_norm": Curve("|du/dt|", "norm per row")}

    tangent: Literal["guided", "boundary"] = "guided"
    """Direction of the Jacobian-vector product: the guided velocity v_g, or u(z, t, t | y), the boundary condition of
    iMF (arXiv 2512.02012); without kappa it costs one more forward on the r < t rows."""
    gap_weight: Literal["uniform", "progress"] = "uniform"
    """progress: rows with a small t - r weigh more at the begin of the run, linearly less until all weigh the same at
    its end (arXiv 2511.19065)."""
    adaptive_eps: Positive = 0.01
    """eps of the weight 1 / (s + eps)^p; the paper's text says 1e-3, the authors' code 0.01."""
    adaptive_p: NotNegative = 1.0
    """p of the weight 1 / (s + eps)^p."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """3 F for the regression, guidance, 2 F on the r < t rows for value and tangent."""
        needs_velocity = self.tangent == "boundary" and not (self.guided and self.kappa)
        boundary = self.below if needs_velocity else 0
        return (Phase("", 0.0, 3 + self.guidance_forwards + boundary + 2 * self.below),)

    def schedule(self, progress: float) -> float:
        """How much the weight of r < t rows depends on t - r."""
        return 1 - progress

    @property
    def follows_progress(self) -> bool:
        return self.gap_weight == "progress"

    @property
    def mean_gap(self) -> float:
        """E[t - r] of r < t rows: the mean distance of two draws is 2 times the integral of F (1 - F), here by the
        midpoint rule."""
        count, normal = 10_000, NormalDist(self.time_mean, self.time_std)
        points = ((i + 0.5) / count for i in range(count))
        below = (normal.cdf(math.log(x / (1 - x))) for x in points)
        return 2 * sum(f * (1 - f) for f in below) / count


@dataclass(frozen=True)
class SolutionFlowConfig(Guided):
    """SoFlow (arXiv 2512.15657): the discrete target, whose share falls exponentially. Defaults: the authors' code for
    ImageNet."""

    omega: float = 0.75
    kappa: float = 0.75
    guidance_full_below: Share = 0.8
    """Guidance is full for t up to this, and fades to none at t = 1."""
    share_start: Share = 0.1
    """Share of [r, t] that the target's step of the velocity takes, at the run's begin."""
    share_end: Share = 0.002
    """The same at the end; it falls exponentially."""
    velocity_time_mean: float = -0.2
    """Mean of the normal under the logit-normal t of r = t rows."""
    velocity_time_std: Positive = 1.0
    time_mean: float = 0.2
    """The same for t of the r < t rows."""
    time_std: Positive = 0.8
    r_mean: float = -1.0
    """The same for r of the r < t rows, before it is limited to t - 1e-4."""
    r_std: Positive = 0.8
    adaptive_eps: Positive = 0.01
    """eps of the weight 1 / (m + eps)^p, where m is a mean over C, H, W."""
    adaptive_p: NotNegative = 1.0

    @property
    def sampler(self) -> Literal["meanflow", "restart", "euler"]:
        """The paper's: fresh noise between the steps."""
        return "euler" if self.is_flow else "restart"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """3 F for the regression, guidance, 1 F on the r < t rows for the target's second pass."""
        return (Phase("", 0.0, 3 + self.guidance_forwards + self.below, more_in_bf16=self.below),)

    def schedule(self, progress: float) -> float:
        return self.share_start * (self.share_end / self.share_start) ** progress

    def check(self, section: str, num_classes: int) -> None:
        super().check(section, num_classes)
        if not 0 < self.share_end <= self.share_start <= 1:
            raise UserError(
                f"{section}.share_start {self.share_start} and share_end {self.share_end}: expected "
                "0 < share_end <= share_start <= 1"
            )


@dataclass(frozen=True)
class AlphaFlowConfig(GuidedInInterval):
    """alpha-Flow (arXiv 2510.20771): trajectory flow matching, then the discrete target, then MeanFlow."""

    SUMS: ClassVar[dict[str, Curve | None]] = MeanFlowConfig.SUMS
    TRAJECTORY, DISCRETE, MEANFLOW = "trajectory flow matching", "discrete target", "MeanFlow target"
    """Names of the phases."""
    SHARPNESS: ClassVar[float] = 25.0
    """Of the sigmoid."""
    NEGLIGIBLE: ClassVar[float] = 0.005
    """Distance from 1 and 0 at which the share becomes 1 and 0."""

    share_r_equals_t: RowShare = Fraction(1, 2)
    window_start: Share = 0.0
    """Progress at which the sigmoid schedule of the share begins."""
    window_end: Share = 1.0
    """Progress at which it ends. The share differs from 1 and 0 in the middle 42 % of the window."""
    clip: Positive = 4.0
    """Bound of the discrete target's values."""
    adaptive_eps: Positive = 1e-3
    """eps of the weight 1 / (m + eps), where m is a mean over C, H, W."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """3 F for the regression, guidance, and on the r < t rows nothing, 1 F for the target's second pass, 2 F for
        value and tangent."""
        half = math.log(1 / self.NEGLIGIBLE - 1) / self.SHARPNESS
        begin, width = self.window_start, self.window_end - self.window_start
        cost = 3 + self.guidance_forwards
        return (
            Phase(self.TRAJECTORY, 0.0, cost),
            Phase(self.DISCRETE, begin + width * (0.5 - half), cost + self.below, more_in_bf16=self.below),
            Phase(self.MEANFLOW, begin + width * (0.5 + half), cost + 2 * self.below),
        )

    def schedule(self, progress: float) -> float:
        first, _, last = self.phases
        if self.phase(progress) in (first, last):
            return float(self.phase(progress) == first)
        within = (progress - self.window_start) / (self.window_end - self.window_start)
        return 1 / (1 + math.exp(self.SHARPNESS * (within - 0.5)))

    def check(self, section: str, num_classes: int) -> None:
        super().check(section, num_classes)
        if self.window_start >= self.window_end:
            raise UserError(f"{section}.window_start {self.window_start} is not below window_end {self.window_end}")


@dataclass(frozen=True)
class ImfConfig(Objective):
    """Improved MeanFlow (iMF, arXiv 2512.02012): guidance is an input of the network, drawn for each row, and targets
    come from a second head, of the velocity. Defaults: the authors' code."""

    NETWORKS: ClassVar[tuple[str, ...]] = ("imf_dit",)
    SECOND_HEAD_PASSES: ClassVar[float] = 3.0
    SUMS: ClassVar[dict[str, Curve | None]] = {
        **MeanFlowConfig.SUMS,
        "velocity_head": Curve("Raw loss", "per row, sum over C, H, W", "velocity head", is_log=True),
    }

    share_r_equals_t: RowShare = Fraction(1, 2)
    label_drop: Share = 0.1
    """Share of ALL rows whose label becomes the null class."""
    omega_max: Positive = 8.0
    """The guidance scale omega of a row is drawn from [1, omega_max]."""
    omega_exponent: NotNegative = 1.0
    """Its density is proportional to omega^-omega_exponent."""
    time_mean: float = -0.4
    """Mean of the normal under the logit-normal times."""
    time_std: Positive = 1.0
    """Standard deviation of the normal under the logit-normal times."""
    adaptive_eps: Positive = 0.01
    """eps of the weights 1 / (s + eps)^p of both heads' losses."""
    adaptive_p: NotNegative = 1.0
    """p of the same."""

    def draws(self, latent: tuple[int, int, int]) -> dict[str, Draw]:
        more = {"omega_uniforms": Draw("uniform", ()), "interval_uniforms": Draw("uniform", (2,))}
        return super().draws(latent) | more

    @property
    def phases(self) -> tuple[Phase, ...]:
        """3 F for the regression, 1 F for the velocity without class, and on the r < t rows 1 F for that with class and
        2 F for value and tangent."""
        below = 1 - float(self.share_r_equals_t)
        return (Phase("", 0.0, 4 + 3 * below),)

    @property
    def follows_progress(self) -> bool:
        return False

    @property
    def guided(self) -> bool:
        return True

    def check(self, section: str, num_classes: int) -> None:
        if num_classes == 0:
            raise UserError(
                f"{section} is trained with guidance, which needs classes, but the dataset has none: use meanflow with "
                "omega=1 and kappa=0, and tangent=boundary for its tangent"
            )
        if self.omega_max < 1:
            raise UserError(f"{section}.omega_max {self.omega_max} must be at least 1")
        if self.is_flow:
            raise UserError(f"{section}.share_r_equals_t must be below 1: r < t rows alone teach averages")
        if not 0 < self.label_drop <= self.share_r_equals_t:
            raise UserError(
                f"{section}.label_drop {self.label_drop} must be above 0, for the null class, and at most "
                f"share_r_equals_t {self.share_r_equals_t}: labels of r = t rows alone are dropped"
            )


OBJECTIVES: dict[str, type[Objective]] = {
    "meanflow": MeanFlowConfig,
    "solution_flow": SolutionFlowConfig,
    "alpha_flow": AlphaFlowConfig,
    "imf": ImfConfig,
}
"""By the name of their section in the config."""
