"""AdamW with the EMAs of the weights as additional optimizer states, which ZeRO shards like the others.

The update is one pass over memory: compiled it is one kernel, 36 bytes per parameter with one EMA; otherwise a CPU runs
its operations on pieces that stay in the cache.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mf_dist.config.schema import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 131_072
"""Numbers of a state that a CPU updates at once: with all states some 3 MB, which stay in its cache."""
Scalar = float | Tensor


def ema_name(decay: float) -> str:
    """Name of the optimizer state and of its file in a checkpoint."""
    return f"ema-{decay}"


def ema_decay_after(step: int, decay: float, warmup: bool) -> float:
    """The EMA's decay in step 1, 2, ...: with warm-up min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class AdamWEma(torch.optim.Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101), then ema <- decay ema + (1 - decay) weights for each EMA."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | list[dict[str, Any]],
        config: OptimConfig,
        gradient_factor: Callable[[], float] = lambda: 1.0,
        compiles: bool = False,
    ) -> None:
        """`gradient_factor` returns the factor for the gradients of the current step; 0 skips the step. `compiles`: the
        update by torch.compile; its results differ from the others by rounding."""
        super().__init__(params, {"lr": config.lr})
        self.config, self.gradient_factor, self.compiles = config, gradient_factor, compiles
        self.states = (*MOMENTS, *map(ema_name, config.ema_decay))
        """Names of the states that have the shape of their parameter; the state also has `step`."""
        self.gradients: dict[Tensor, Tensor] = {}
        """Gradients of parameters that have no .grad; their dtype may differ."""
        self.copies: dict[Tensor, Tensor] = {}
        """Copies of parameters in another dtype, which the update writes too."""
        self._compiled = torch.compile(self._update, fullgraph=True, dynamic=False) if compiles else None

    def init_state(self, p: Tensor) -> None:
        """Zero moments and EMAs equal to the weights."""
        self.state[p]["step"] = torch.tensor(0.0)
        for name in self.states:
            self.state[p][name] = torch.zeros_like(p) if name in MOMENTS else p.detach().clone()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                grad = self.gradients.get(p, p.grad)
                if grad is None:
                    continue
                if not self.state[p]:
                    self.init_state(p)
                if factor := self.gradient_factor():
                    self._step(p, grad, factor, group["lr"])

    def _step(self, p: Tensor, grad: Tensor, factor: float, lr: float) -> None:
        config, state = self.config, self.state[p]
        state["step"] += 1
        n = int(state["step"])
        decays = [ema_decay_after(n, decay, config.ema_warmup) for decay in config.ema_decay]
        scalars = [factor, -lr / (1 - config.beta1**n), 1 - config.beta2**n, *(1 - decay for decay in decays)]
        tensors = [p.detach(), grad, *(state[name] for name in self.states)]
        if p in self.copies:
            tensors.append(self.copies[p])
        scalars += [1 - lr * config.weight_decay] if config.weight_decay else []
        if self._compiled is not None:  # tensors, since it would be compiled anew for other numbers
            self._compiled(tensors, [torch.tensor(a, dtype=torch.float32) for a in scalars])
            return
        pieces = zip(*(a.view(-1).split(PIECE) for a in tensors), strict=True)
        for piece in pieces if p.device.type == "cpu" else [tensors]:
            self._update(list(piece), scalars)

    def _update(self, tensors: list[Tensor], scalars: Sequence[Scalar]) -> None:
        """`tensors`: weights, their gradient, states and possibly a copy; all but the gradient change in place.
        `scalars`: gradient factor, - lr / (1 - beta1^n), 1 - beta2^n, 1 - decay of each EMA, and 1 - lr weight_decay if
        there is weight decay."""
        (p, grad, exp_avg, exp_avg_sq, *rest), (factor, rate, correction, *others) = tensors, scalars
        config, count = self.config, len(self.config.ema_decay)
        emas, copies, ema_weights, shrinks = rest[:count], rest[count:], others[:count], others[count:]
        grad = grad.to(p.dtype)
        if isinstance(factor, Tensor) or factor != 1:
            grad = grad * factor
        exp_avg.lerp_(grad, 1 - config.beta1)
        exp_avg_sq.mul_(config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
        root = (exp_avg_sq / correction).sqrt_().add_(config.eps)
        for shrink in shrinks:
            p.mul_(shrink)
        p.add_((exp_avg * rate).div_(root))
        for ema, weight in zip(emas, ema_weights, strict=True):
            ema.lerp_(p, weight)
        for copy in copies:
            copy.copy_(p)
