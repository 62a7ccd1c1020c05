"""What becomes of a step whose gradient is not finite, or far larger than usual. Pure arithmetic on the global norm,
which is the same number on every rank: so all ranks decide the same without asking each other."""

import math
from typing import Any

from mf_dist.config.schema import OptimConfig

MEMORY = 0.99
"""Of the running mean of the norm: it looks back over some 100 steps."""
WARM_UP = 20
"""Steps before a norm can be called a spike."""


class GradientGuard:
    """judge() each step's norm; state() goes into the checkpoint, so that a resumed run judges alike."""

    def __init__(self, config: OptimConfig) -> None:
        self.factor, self.action = config.spike_factor, config.spike_action
        self.mean, self.judged = 0.0, 0
        self.skipped, self.skipped_in_row, self.clipped = 0, 0, 0
        self.last = ""
        """What the last step met beside an ordinary update, for the log: empty, or a few words."""

    def judge(self, norm: float) -> float:
        """What to multiply the gradient of norm `norm` by; 0: leave the step out."""
        if not math.isfinite(norm) or norm < 0:  # DeepSpeed reports some norms that are not finite as -1
            return self._skip("the gradient is not finite")
        limit = self.factor * self.mean
        is_spike = self.factor > 0 and self.judged >= WARM_UP and norm > limit
        if is_spike and self.action == "skip":
            return self._skip(f"gradient norm {norm:.3g} above the limit {limit:.3g}")
        self.last = f"gradient norm {norm:.3g} clipped to the limit {limit:.3g}" if is_spike else ""
        self.clipped += is_spike
        self.skipped_in_row = 0
        self._remember(min(norm, limit) if is_spike else norm)
        return limit / norm if is_spike else 1.0

    def _skip(self, why: str) -> float:
        self.last = f"step left out: {why}"
        self.skipped += 1
        self.skipped_in_row += 1
        return 0.0

    def _remember(self, norm: float) -> None:
        self.judged += 1
        memory = min(MEMORY, 1 - 1 / self.judged)  # a plain mean at first
        self.mean = memory * self.mean + (1 - memory) * norm

    def state(self) -> dict[str, Any]:
        names = ("mean", "judged", "skipped", "skipped_in_row", "clipped")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in self.state():
            setattr(self, name, state[name])
