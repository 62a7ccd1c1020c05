"""AdamW that keeps the EMA of the weights as one more optimizer state, so that ZeRO shards it like any other."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mf_dist.config import OptimConfig

STATES = ("exp_avg", "exp_avg_sq", "ema")
"""The states shaped like their parameter; `step` counts beside them."""


def ema_decay_after(step: int, decay: float, warmup: bool) -> float:
    """The EMA's decay in step 1, 2, ...: with warm-up min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class AdamWEma(torch.optim.Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101), then ema <- decay ema + (1 - decay) weights."""

    def __init__(self, params: Iterable[nn.Parameter], config: OptimConfig) -> None:
        super().__init__(params, {"lr": config.lr})
        self.config = config

    def init_state(self, p: Tensor) -> None:
        """Zero moments and an EMA equal to the weights."""
        self.state[p].update(
            step=torch.tensor(0.0),
            exp_avg=torch.zeros_like(p),
            exp_avg_sq=torch.zeros_like(p),
            ema=p.detach().clone(),
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.init_state(p)
                self._update(p, self.state[p], group["lr"])

    def _update(self, p: Tensor, state: dict[str, Tensor], lr: float) -> None:
        config, grad = self.config, p.grad
        assert grad is not None
        state["step"] += 1
        n = int(state["step"])
        state["exp_avg"].lerp_(grad, 1 - config.beta1)
        state["exp_avg_sq"].mul_(config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
        root = (state["exp_avg_sq"] / (1 - config.beta2**n)).sqrt_().add_(config.eps)
        if config.weight_decay:
            p.mul_(1 - lr * config.weight_decay)
        p.addcdiv_(state["exp_avg"], root, value=-lr / (1 - config.beta1**n))
        state["ema"].lerp_(p, 1 - ema_decay_after(n, config.ema_decay, config.ema_warmup))
