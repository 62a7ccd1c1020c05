"""DeepSpeed engine around the loss. The only module that imports DeepSpeed.

State is exchanged as full fp32 tensors by parameter name, independent of world size and ZeRO stage. Only
`_create_states` and `_set_partition` use DeepSpeed's internals (0.19.8) for this, and data_parallel.py to overlap
communication at ZeRO-1 in bf16.
"""

import contextlib
import io
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mf_dist.config.cost import REDUCED_TOGETHER
from mf_dist.config.schema import Config
from mf_dist.fault_tolerance.watchdog import process_group_timeout
from mf_dist.objectives.base import Loss, Sums
from mf_dist.runtime.distributed import Ranks, check_same_on_all_ranks, sum_over_ranks
from mf_dist.runtime.errors import UserError
from mf_dist.training.data_parallel import DataParallel, parameter_groups
from mf_dist.training.gradient_guard import GradientGuard
from mf_dist.training.optimizer import AdamWEma, ema_name

# without it DeepSpeed warns where it finds no GPU; one that was set for another machine would end the run
os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
sys.modules.setdefault("apex", None)  # type: ignore[arg-type]  # DeepSpeed imports it, for nothing that is used here
with contextlib.redirect_stdout(io.StringIO()):  # without nvcc it lists the kernels of its own that it cannot build
    import deepspeed
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

MASTER = "master"
"""Kind of the fp32 weights, in addition to the optimizer's states."""


def _forbid_shared_memory_build() -> None:
    """On a CPU DeepSpeed compiles its own all-reduce at startup. Gloo does not need it, and a killed build leaves a
    lock file on which every later run waits forever without a message."""
    from deepspeed.ops import __compatible_ops__

    if not torch.cuda.is_available():
        __compatible_ops__["deepspeed_shm_comm"] = False


def _read_memory_by_torch() -> None:
    """DeepSpeed asks NVML for free memory where nvidia-ml-py is installed, and takes CUDA_VISIBLE_DEVICES for a list of
    numbers, which UUIDs and MIG names are not. Without NVML it asks torch."""
    from deepspeed.accelerator import cuda_accelerator

    cuda_accelerator.pynvml = None


def _mask_without_a_copy() -> None:
    """DeepSpeed marks a norm that is not finite by a -1 that it copies from pageable memory, for which the host waits
    until the GPU has done all before."""
    from deepspeed.runtime import utils
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    def mask(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
        norm.masked_fill_(~norm.isfinite(), val)

    for module in (utils, stage_1_and_2, stage3):
        module.mask_nan_or_inf_with_val_inplace = mask


def _set_time_limit(seconds: float) -> None:
    """For DeepSpeed's copy of the world group, which runs all its collectives. torch's default for NCCL is 10 minutes,
    after which it could abort a rank before the watchdog reports."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timedelta(seconds=seconds), deepspeed.utils.groups._clone_world_group())


def _make_deterministic() -> None:
    """On a GPU: attention and embedding backward without atomics, and reductions whose block sizes are not chosen by
    timing at each start. Operations without such a form then raise RuntimeError."""
    import torch._inductor.config as inductor

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid, one more write of every tensor
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward has no deterministic form
    inductor.deterministic = True


def _compile(loss: Loss, stage: int, is_bf16: bool, world_size: int) -> None:
    """Compiles in place. Shapes never change, so nothing is recompiled; compilation happens in the first step.

    One rank at stage 1 or 2: one graph. Several ranks: one for each block and one for the layers after them, since the
    backward of a graph returns all its gradients at its end, and none could be reduced earlier; what comes before the
    blocks is small. Only functions are compiled, not modules, whose hooks a graph cannot contain."""
    if is_bf16 and not torch.cuda.is_available():
        # in torch 2.13.0, C++ of two equal sums in bf16 (of two biases' gradients) that are fused does not compile
        torch._inductor.config.cpp.max_horizontal_fusion_size = 1
    net = loss.net
    blocks = [block for branch in net.branches() for block in branch.blocks]
    if stage == 3:
        # ZeRO-3 gathers weights in hooks around each module, which break each block's graph at every linear. torch
        # gives up on a function, and runs it eagerly, after 8 versions: Linear.forward has more.
        torch._dynamo.config.recompile_limit = 32
        for block in blocks:
            block.compile(dynamic=False)
    elif world_size == 1:
        loss.forward = torch.compile(loss.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    else:
        net.output = torch.compile(net.output, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
        for block in blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


class FirstGradientCheck:
    """Compares the first step's reduced gradient of one weight with the mean of the ranks' local gradients. The weight
    is that of the last linear, whose gradient is not 0 at the initial weights."""

    def __init__(self, p: Tensor, is_bf16: bool) -> None:
        self._p, self._local, self._tolerance = p, torch.zeros((), device=p.device), 2e-2 if is_bf16 else 1e-4
        self._hook = p.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        self._local = self._local + gradient.detach().float()

    def check(self) -> None:
        """Call between the step's last backward and the optimizer step (DeepSpeed has divided each loss by the number
        of micro-batches). Raises UserError if the gradients differ."""
        self._hook.remove()
        mean = sum_over_ranks(self._local.contiguous()) / torch.distributed.get_world_size()
        reduced = safe_get_full_grad(self._p).float()
        difference = ((reduced - mean).norm() / mean.norm().clamp(min=1e-30)).item()
        if not difference <= self._tolerance and mean.isfinite().all():
            raise UserError(
                f"the reduced gradient is not the mean of the ranks' gradients: relative difference {difference:.1e}, "
                f"tolerance {self._tolerance:.0e}; check the network between the nodes and the NCCL settings"
            )


class Engine:
    """An optimizer step is `accumulation` calls of train_micro_batch."""

    def __init__(self, loss: Loss, config: Config, ranks: Ranks) -> None:
        assert config.train.micro_batch is not None
        _forbid_shared_memory_build()
        _read_memory_by_torch()
        _mask_without_a_copy()
        if config.engine.deterministic and ranks.device.type == "cuda":
            _make_deterministic()
        self.stage, self.is_bf16 = config.engine.zero_stage, config.engine.precision == "bf16"
        self.accumulation = config.train.batch_size // (config.train.micro_batch * ranks.world_size)
        self.guard, self._grad_clip = GradientGuard(config.optim), config.optim.grad_clip
        self.steps = 0
        """Optimizer steps completed since this engine was created, skipped ones included."""
        self._judged_step, self._factor = -1, 1.0
        # with fp32 accumulation DeepSpeed uses another optimizer class here than at the other stages and in fp32
        groups = parameter_groups(loss.net, ranks.world_size) if self.stage == 1 and self.is_bf16 else None
        parameters = [{"params": group} for _, group in groups] if groups else loss.parameters()
        self._optimizer = AdamWEma(parameters, config.optim, self._gradient_factor, config.engine.compile)
        self.kinds = (MASTER, *self._optimizer.states)
        """Kinds of tensors that a checkpoint holds for each parameter."""
        loss.net.checkpoint_blocks = config.engine.checkpoint_activations
        loss.in_bf16 = self.is_bf16
        loss.net.tangent_dtype = torch.float32 if config.engine.jvp_precision == "fp32" else None
        if config.engine.compile:
            _compile(loss, self.stage, self.is_bf16, ranks.world_size)
        weights = ((name, p.to(ranks.device)) for name, p in loss.net.named_parameters())  # NCCL takes none on the CPU
        check_same_on_all_ranks(weights, "initial weights")
        first_linear = loss.net.branches()[0].last_linear
        self._first_gradient: FirstGradientCheck | None = FirstGradientCheck(first_linear.weight, self.is_bf16)
        with contextlib.redirect_stdout(io.StringIO()):  # discards its memory tables
            self._engine, *_ = deepspeed.initialize(
                model=loss,
                optimizer=self._optimizer,
                dist_init_required=False,
                config={
                    "train_batch_size": config.train.batch_size,
                    "train_micro_batch_size_per_gpu": config.train.micro_batch,
                    "gradient_accumulation_steps": self.accumulation,
                    "zero_optimization": {
                        "stage": self.stage,
                        "overlap_comm": ranks.world_size > 1,
                        "reduce_bucket_size": REDUCED_TOGETHER,
                    },
                    "zero_allow_untested_optimizer": True,
                    "bf16": {
                        "enabled": self.is_bf16,
                        "check_grad_overflow": False,  # the guard judges the norm
                        "immediate_grad_update": True,  # each gradient is passed on during the backward
                    },
                    "communication_data_type": "fp32",
                    "data_types": {"grad_accum_dtype": "fp32"},
                    "gradient_clipping": config.optim.grad_clip,
                    "steps_per_print": 10**9,
                    "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a step
                },
            )
        _set_time_limit(process_group_timeout(config.train.hang_seconds))
        self._data_parallel: DataParallel | None = None
        if groups:
            self._engine.enable_backward_allreduce = False
            self._data_parallel = DataParallel(self._engine.optimizer, groups, self._optimizer, self.accumulation)
        self._create_states()

    def set_learning_rate(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def train_micro_batch(self, x: Tensor, y: Tensor, draws: dict[str, Tensor], schedule: Tensor) -> Sums:
        """Forward and backward; the last call of a batch also steps the optimizer. Returns the loss's log sums."""
        loss, sums = self._engine(x, y, draws, schedule)
        is_last = self._engine.is_gradient_accumulation_boundary()
        if self._data_parallel:
            self._data_parallel.begin(self._engine.micro_steps % self.accumulation)
        self._engine.backward(loss)
        if self._data_parallel and is_last:
            self._data_parallel.finish()
        if self._first_gradient and is_last:
            self._first_gradient.check()
            self._first_gradient = None
        self._engine.step()
        if is_last:
            if self._engine.optimizer.overflow:  # DeepSpeed skipped the step without calling our optimizer
                self.guard.judge(math.nan)
            self.steps += 1
        return sums  # type: ignore[no-any-return]

    def _gradient_factor(self) -> float:
        """Factor for this step's gradient. DeepSpeed calls the optimizer once per partition, after the global norm is
        known."""
        if self._judged_step != self.steps:
            norm = float(self._engine.optimizer._global_grad_norm)
            self._judged_step, self._factor = self.steps, self.guard.judge(norm)
            if self._data_parallel and 0 < self._grad_clip < norm:
                self._factor *= self._grad_clip / norm
        return self._factor

    def grad_norm(self) -> float:
        """Norm of the whole gradient of the last optimizer step."""
        return float(self._engine.get_global_grad_norm())

    def compiled(self) -> str:
        """Counts of compiled graphs and graph breaks so far, for the log."""
        breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
        return f"{graphs} compiled graphs, {breaks} graph breaks" if graphs else "not compiled"

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, parameter name, full fp32 tensor on the CPU) for all of `kinds`. Collective: every rank must consume
        it."""
        self._finish_gathering()
        for name, p in self._parameters():
            yield MASTER, name, safe_get_full_fp32_param(p).float().cpu()
            for kind in self._optimizer.states:
                yield kind, name, safe_get_full_optimizer_state(p, kind).float().cpu()

    def ema(self, decay: float) -> dict[str, Tensor]:
        """Full EMA weights on the CPU. Collective: every rank must call it."""
        self._finish_gathering()
        kind = ema_name(decay)
        return {name: safe_get_full_optimizer_state(p, kind).float().cpu() for name, p in self._parameters()}

    def _finish_gathering(self) -> None:
        """Before collectives of another process group, which must not run beside those of a step."""
        if self._data_parallel:
            self._data_parallel.wait_for_weights()

    def load_state(self, kind: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The inverse of `state`, for one kind, from any world size and stage: (parameter name, full tensor) of all
        parameters, in any order, the same one on every rank."""
        parameters = dict(self._parameters())
        for name, tensor in tensors:
            p = parameters[name]
            if self.stage == 3:
                self._set_partition(p, tensor, kind)
            elif kind == MASTER:
                safe_set_full_fp32_param(p, tensor)
            else:
                safe_set_full_optimizer_state(p, tensor, kind)
            if kind == MASTER:  # without these copies, the first step would compute with the initial weights
                with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=self.stage == 3):
                    if self.stage < 3 or torch.distributed.get_rank() == 0:
                        p.data.copy_(tensor)
        if kind == MASTER and self.stage < 3:  # at stage 3 each weight exists only once
            check_same_on_all_ranks(self._parameters(), "resumed weights")

    def set_optimizer_steps(self, steps: int) -> None:
        """After load_state: how many steps the optimizer has made, without skipped ones."""
        for state in self._optimizer.state.values():
            state["step"] = torch.tensor(float(steps))

    def _set_partition(self, p: Any, tensor: Tensor, kind: str) -> None:
        """At stage 3, this rank's partition of a parameter. The last one is padded, which safe_set_full_* forgets."""
        size, first = p.ds_tensor.numel(), p.ds_tensor.numel() * torch.distributed.get_rank()
        own = tensor.flatten()[first : first + size]
        own = nn.functional.pad(own, (0, size - len(own)))
        if kind == MASTER:
            safe_set_local_fp32_param(p, own)
        else:
            safe_set_local_optimizer_state(p, own, kind)

    def _create_states(self) -> None:
        """Creates the optimizer states on the flat partitions, as the first step would: their memory is allocated at
        startup, and a checkpoint can be written and loaded at any time."""
        zero = self._engine.optimizer
        if self.stage == 3:
            partitions = zero.fp32_partitioned_groups_flat
        elif self.stage == 1 and self.is_bf16:  # with fp32 accumulation DeepSpeed uses another optimizer class here
            partitions = zero.fp32_groups_flat_partition
        else:
            partitions = zero.single_partition_of_fp32_groups
        for partition in partitions:
            self._optimizer.init_state(partition)
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _parameters(self) -> Iterator[tuple[str, Any]]:
        module: nn.Module = self._engine.module.net
        yield from module.named_parameters()
