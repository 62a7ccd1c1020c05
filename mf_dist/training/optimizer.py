"""AdamW with the EMAs of the weights as additional optimizer states, which ZeRO shards like the others."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mf_dist.config.schema import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def ema_name(decay: float) -> str:
    """Name of the optimizer state and of its file in a checkpoint."""
    return f"ema-{decay}"


def ema_decay_after(step: int, decay: float, warmup: bool) -> float:
    """The EMA's decay in step 1, 2, ...: with warm-up min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class AdamWEma(torch.optim.Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101), then ema <- decay ema + (1 - decay) weights for each EMA."""

    def __init__(
        self, params: Iterable[nn.Parameter], config: OptimConfig, gradient_factor: Callable[[], float] = lambda: 1.0
    ) -> None:
        """`gradient_factor` returns the factor for the gradients of the current step; 0 skips the step."""
        super().__init__(params, {"lr": config.lr})
        self.config, self.gradient_factor = config, gradient_factor
        self.states = (*MOMENTS, *map(ema_name, config.ema_decay))
        """Names of the states that have the shape of their parameter; the state also has `step`."""

    def init_state(self, p: Tensor) -> None:
        """Zero moments and EMAs equal to the weights."""
        self.state[p]["step"] = torch.tensor(0.0)
        for name in self.states:
            self.state[p][name] = torch.zeros_like(p) if name in MOMENTS else p.detach().clone()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.init_state(p)
                factor = self.gradient_factor()
                if factor:
                    self._update(p, p.grad if factor == 1 else p.grad * factor, self.state[p], group["lr"])

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float) -> None:
        config = self.config
        state["step"] += 1
        n = int(state["step"])
        state["exp_avg"].lerp_(grad, 1 - config.beta1)
        state["exp_avg_sq"].mul_(config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
        root = (state["exp_avg_sq"] / (1 - config.beta2**n)).sqrt_().add_(config.eps)
        if config.weight_decay:
            p.mul_(1 - lr * config.weight_decay)
        p.addcdiv_(state["exp_avg"], root, value=-lr / (1 - config.beta1**n))
        for decay in config.ema_decay:
            state[ema_name(decay)].lerp_(p, 1 - ema_decay_after(n, decay, config.ema_warmup))
