"""When collectives start between the operators of a step, on simulated GPUs; run by each rank.

    PYTHONPATH=tests/simcuda python -m simcuda tests/simcuda/measure_order.py CONFIG [section.key=value ...]

Prints one JSON object: for each reduction of the third step the share of the backward's operators that were started
before it, and for each wait for gathered weights the share of the next forward's.
"""

import json
import sys

import torch.distributed as dist
from measure_engine import build
from simcuda import device

from mf_dist.runtime.distributed import process_group
from mf_dist.runtime.launch import exit_without_finalization
from mf_dist.training import data_parallel

data_parallel.BLOCKS_TOGETHER = 1000  # so that a small network has several groups


def shares(owner, name, counted, method):
    """Runs the method; calls of owner.name within it, each as a share of the operators started by then."""
    calls, original = [], getattr(owner, name)

    def noted(*args, **options):
        if counted(*args):
            calls.append(len(device.records()))
        return original(*args, **options)

    setattr(owner, name, noted)
    device.record(True)
    result = method()
    total = len(device.records())
    device.record(False)
    setattr(owner, name, original)
    return result, [round(call / total, 3) for call in calls]


def main() -> None:
    path, *overrides = sys.argv[1:]
    with process_group() as ranks:
        engine, _, batch = build(ranks, path, overrides)
        for _ in range(3 * engine.accumulation - 1):  # up to the third step's last micro-batch
            engine.train_micro_batch(*batch())
        inner, parallel = engine._engine, engine._data_parallel
        gathering = lambda group: parallel._gathers[group] is not None  # noqa: E731
        (loss, _), waits = shares(parallel, "_wait_for_weights", gathering, lambda: inner(*batch()))
        parallel.begin(engine.accumulation - 1)
        _, reductions = shares(dist, "reduce_scatter_single", lambda *_: True, lambda: inner.backward(loss))
        parallel.finish()
        inner.step()
        parallel.wait_for_weights()
        if ranks.is_rank_zero:
            print(json.dumps({"reductions": reductions, "waits": waits}), flush=True)


if __name__ == "__main__":
    main()
    exit_without_finalization(0)
