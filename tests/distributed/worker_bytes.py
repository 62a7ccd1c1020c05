"""The training command; at its end rank 0 writes the bytes of tensors per kind of collective in one step.

    worker_bytes.py OUT.json reuse|no-reuse CONFIG [section.key=value ...]

With no-reuse ZeRO-3 keeps no gathered weights, as for a model of more than 1e9 weights.
"""

import json
import sys
from collections import Counter

import deepspeed
import torch
import torch.distributed as dist

from mf_dist import train
from mf_dist.runtime.launch import exit_without_finalization
from mf_dist.training.trainer import Trainer

KINDS = {
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "all_gather_single": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "all_to_all_single": "all-to-all",
}
OUT, REUSE = sys.argv.pop(1), sys.argv.pop(1) == "reuse"
sent: Counter = Counter()
state = {"counting": False, "depth": 0}


def size(value):
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def counted(name):
    original = getattr(dist, name)

    def run(*args, **kwargs):
        if state["counting"] and not state["depth"]:  # a collective may call others
            sent[KINDS[name]] += max(map(size, [*args, *kwargs.values()]))
        state["depth"] += 1
        try:
            return original(*args, **kwargs)
        finally:
            state["depth"] -= 1

    setattr(dist, name, run)


def without_reuse(initialize):
    def run(**kwargs):
        names = ("max_live_parameters", "max_reuse_distance", "param_persistence_threshold")
        kwargs["config"]["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
        return initialize(**kwargs)

    return run


def one_step(self, batches):
    state["counting"] = self.step == 2
    plain_step(self, batches)
    state["counting"] = False
    if self.step == 3 and self.ranks.is_rank_zero:
        with open(OUT, "w") as file:
            json.dump(sent, file)


for kind in KINDS:
    counted(kind)
if not REUSE:
    deepspeed.initialize = without_reuse(deepspeed.initialize)
plain_step, Trainer._one_step = Trainer._one_step, one_step
if __name__ == "__main__":
    exit_without_finalization(train.main())
