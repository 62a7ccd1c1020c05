"""Skips steps whose gradient is not finite, and clips or skips spikes of its norm. The decision depends only on the
global norm, which is the same on every rank, so all ranks agree without communication."""

import math
from typing import Any

from mf_dist.config.schema import OptimConfig

MEAN_DECAY = 0.99
"""Decay of the running mean of the norm, an average over about 100 steps."""
WARM_UP = 20
"""Steps before a norm can count as a spike."""


class GradientGuard:
    """judge() is called with each step's norm. state() is saved in the checkpoint, so a resumed run decides alike."""

    def __init__(self, config: OptimConfig) -> None:
        self.factor, self.action = config.spike_factor, config.spike_action
        self.mean, self.judged = 0.0, 0
        self.skipped, self.skipped_in_row, self.clipped = 0, 0, 0
        self.last_event = ""
        """What happened to the last step, for the log; empty after an ordinary update."""

    def judge(self, norm: float) -> float:
        """The factor to multiply the gradient of norm `norm` by; 0: skip the step."""
        if not math.isfinite(norm) or norm < 0:  # DeepSpeed reports some non-finite norms as -1
            return self._skip("the gradient is not finite")
        limit = self.factor * self.mean
        is_spike = self.factor > 0 and self.judged >= WARM_UP and norm > limit
        if is_spike and self.action == "skip":
            return self._skip(f"gradient norm {norm:.3g} above the limit {limit:.3g}")
        self.last_event = f"gradient norm {norm:.3g} clipped to the limit {limit:.3g}" if is_spike else ""
        self.clipped += is_spike
        self.skipped_in_row = 0
        self._update_mean(min(norm, limit) if is_spike else norm)
        return limit / norm if is_spike else 1.0

    def _skip(self, reason: str) -> float:
        self.last_event = f"step left out: {reason}"
        self.skipped += 1
        self.skipped_in_row += 1
        return 0.0

    def _update_mean(self, norm: float) -> None:
        self.judged += 1
        decay = min(MEAN_DECAY, 1 - 1 / self.judged)  # a plain mean at first
        self.mean = decay * self.mean + (1 - decay) * norm

    def state(self) -> dict[str, Any]:
        names = ("mean", "judged", "skipped", "skipped_in_row", "clipped")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in self.state():
            setattr(self, name, state[name])
