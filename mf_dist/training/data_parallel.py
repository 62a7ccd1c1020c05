"""Data parallelism of ZeRO-1 in bf16, overlapped with compute.

Parameters are in groups of some blocks, in the order of the forward; each rank holds an equal part of every group's
fp32 weights and optimizer states. As soon as the backward has written the last gradient of a group, its sum over
ranks is reduce-scattered while the backward goes on; after the update its bf16 weights are gathered while the next
forward already runs, which waits before the group's first block.

DeepSpeed's BF16_Optimizer (0.19.8) holds the tensors. By itself it sums all gradients by an all-reduce after the
backward, and gathers all weights before the next forward.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mf_dist.config.cost import BLOCKS_TOGETHER
from mf_dist.models.network import Branch, Network
from mf_dist.training.optimizer import AdamWEma


def parameter_groups(net: Network, world_size: int) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """The groups in the order of the forward, each with the module before whose forward its weights must be complete:
    the network for the layers before the blocks, or a block. The layers after a branch's blocks belong to its last
    one. A branch that not every pass computes has groups of its own. All but the first of a branch have BLOCKS_TOGETHER
    parameters or more. One rank has a single group."""
    if world_size == 1:
        return [(net, list(net.parameters()))]
    branches = [_units(branch) for branch in net.branches()]
    in_branches = {id(p) for units in branches for _, parameters in units for p in parameters}
    branches[0].insert(0, (net, [p for p in net.parameters() if id(p) not in in_branches]))
    return [group for units in branches for group in _together(units)]


def _units(branch: Branch) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Each block with its parameters, the last one also with those of the layers after it."""
    units = [(block, list(block.parameters())) for block in branch.blocks]
    for layer in (*branch.last_layers, branch.last_linear):
        units[-1][1].extend(layer.parameters())
    return units


def _together(units: list[tuple[nn.Module, list[nn.Parameter]]]) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Successive units joined, from the last to the first, until there are BLOCKS_TOGETHER parameters."""
    groups = [units[-1]]
    for module, parameters in reversed(units[:-1]):
        if sum(p.numel() for p in groups[0][1]) < BLOCKS_TOGETHER:
            groups[0] = (module, parameters + groups[0][1])
        else:
            groups.insert(0, (module, parameters))
    return groups


class DataParallel:
    """Gradients, step and weights of a BF16_Optimizer with `parameter_groups`. With one rank it communicates nothing.

    The first micro-batch of a step overwrites the fp32 gradients, the others add: 6 and 10 bytes per parameter, where
    DeepSpeed moves 34. One rank without accumulation keeps them in bf16: 4 bytes."""

    def __init__(
        self, zero: Any, groups: list[tuple[nn.Module, list[nn.Parameter]]], optimizer: AdamWEma, accumulation: int
    ) -> None:
        """`zero`: the BF16_Optimizer over the groups' parameters, with immediate_grad_update, which passes each
        gradient on when the backward has completed it. `optimizer`: the one inside it."""
        self._zero, self._optimizer, self._accumulation = zero, optimizer, accumulation
        self._world_size, self._rank = dist.get_world_size(), dist.get_rank()
        self._micro_batch = 0
        self._sizes = [len(parameters) for _, parameters in groups]
        self._missing = list(self._sizes)
        self._next = len(groups) - 1
        """The group to be reduced next: on all ranks the last one first, whichever is complete first."""
        self._reductions: list[Any] = []
        self._gathers: list[Any] = [None] * len(groups)
        self._norm: Tensor
        if self._world_size == accumulation == 1:
            self._keep_gradients_in_bf16()
        masters, self._parts = zero.fp32_groups_flat_partition, [p[self._rank] for p in zero.bf16_partitioned_groups]
        optimizer.copies = dict(zip(masters, self._parts, strict=True))
        optimizer.gradients = dict(zip(masters, zero.fp32_groups_gradient_flat_partition, strict=True))
        zero._update_hp_grad = self._accumulate
        zero.clear_hp_grads = lambda: None
        zero.step = self._step
        if self._world_size > 1:
            for group, (module, _) in enumerate(groups):
                module.register_forward_pre_hook(lambda *_, group=group: self._wait_for_weights(group))

    def _keep_gradients_in_bf16(self) -> None:
        """In place of the (only) group's fp32 gradients: nothing is added to them."""
        zero = self._zero
        flat = torch.zeros_like(zero.fp32_groups_gradients_flat[0], dtype=torch.bfloat16)
        views = zero._split_flat_tensor(flat, [p.numel() for p in zero.bf16_groups[0]])
        zero.fp32_groups_gradients_flat[0] = zero.fp32_groups_gradient_flat_partition[0] = flat
        zero.fp32_groups_actual_gradients_flat[0] = flat
        zero.non_expert_gradients[0] = flat
        zero.fp32_groups_gradients[0] = zero.fp32_groups_gradient_dict[0] = views

    def begin(self, micro_batch: int) -> None:
        """Before the backward of the step's micro-batch 0, 1, ..."""
        self._micro_batch, self._missing = micro_batch, list(self._sizes)

    def finish(self) -> None:
        """After the step's last backward: this rank's part of each group's gradient becomes the mean over ranks."""
        assert not any(self._missing), "a parameter got no gradient: its last one would count again"
        while self._next >= 0:
            self._start_reduction()
        parts = self._zero.fp32_groups_gradient_flat_partition
        if self._world_size > 1:
            for reduction in self._reductions:
                reduction.wait()
            torch._foreach_div_(parts, self._world_size)
        squares = torch.stack([part.norm(dtype=torch.float32) for part in parts]).square().sum()
        if self._world_size > 1:
            dist.all_reduce(squares)
        self._norm = squares.sqrt()
        self._reductions, self._next = [], len(self._sizes) - 1

    def wait_for_weights(self) -> None:
        """Before weights are read elsewhere than in a forward."""
        for group in range(len(self._gathers)):
            self._wait_for_weights(group)

    def _accumulate(self, p: Any, group: int, index: int, clear_lp_grads: bool) -> None:
        """In the backward, once p.grad is complete."""
        sums = self._zero.fp32_groups_gradients[group][index]
        if self._micro_batch == 0:
            sums.copy_(p.grad.view(-1))
        else:
            sums.add_(p.grad.view(-1))
        p._hp_grad = sums
        self._missing[group] -= 1
        while self._micro_batch == self._accumulation - 1 and self._next >= 0 and not self._missing[self._next]:
            self._start_reduction()

    def _start_reduction(self) -> None:
        if self._world_size > 1:
            whole = self._zero.fp32_groups_gradients_flat[self._next]
            part = self._zero.fp32_groups_gradient_flat_partition[self._next]
            self._reductions.append(dist.reduce_scatter_single(part, whole, async_op=True))
        self._next -= 1

    @torch.no_grad()
    def _step(self) -> None:
        """In place of DeepSpeed's, which waits for the norm, clips in a pass of its own, and gathers before it returns.
        The optimizer is told by its gradient_factor what to do with a norm that is too large or not finite."""
        self._zero._global_grad_norm = self._norm
        self._optimizer.step()
        if self._world_size > 1:
            for group, part in enumerate(self._parts):
                whole = self._zero.bf16_groups_flat[group]
                self._gathers[group] = dist.all_gather_single(whole, part, async_op=True)

    def _wait_for_weights(self, group: int) -> None:
        if self._gathers[group] is not None:
            self._gathers[group].wait()
            self._gathers[group] = None
