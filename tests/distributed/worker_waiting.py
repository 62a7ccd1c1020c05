"""Run under a launcher: tools/fid_eval.py with a time limit of LIMIT seconds, where rank 0's distance takes longer; or,
after `alone`, rank 0 in a collective that the other rank never calls.

worker_waiting.py alone|ARGUMENTS OF tools/fid_eval.py

And after `train`, a training run whose process group has that limit, where rank 0 takes longer to find a checkpoint and
to draw.
"""

import functools
import runpy
import sys
import time
from pathlib import Path

import torch

import mf_dist.evaluation.metrics
import mf_dist.fault_tolerance.watchdog
import mf_dist.training.snapshots
import mf_dist.training.trainer
from mf_dist import train
from mf_dist.runtime import distributed

LIMIT = 2.0
TOOL = Path(__file__).parents[2] / "tools/fid_eval.py"


def slow(call):
    return lambda *arguments: (time.sleep(2 * LIMIT), call(*arguments))[1]


def main():
    if sys.argv[1:] == ["alone"]:
        with distributed.process_group(LIMIT) as ranks:
            if ranks.is_rank_zero:
                distributed.sum_over_ranks(torch.ones(1))
            time.sleep(2 * LIMIT)
        return
    if sys.argv[1] == "train":
        mf_dist.training.trainer.newest_checkpoint = slow(mf_dist.training.trainer.newest_checkpoint)
        mf_dist.training.snapshots.Snapshots._draw_grid = slow(mf_dist.training.snapshots.Snapshots._draw_grid)
        mf_dist.fault_tolerance.watchdog.process_group_timeout = lambda seconds: LIMIT
        sys.argv.pop(1)
        train.main()
        return
    mf_dist.evaluation.metrics.frechet_distance = slow(mf_dist.evaluation.metrics.frechet_distance)
    distributed.process_group = functools.partial(distributed.process_group, LIMIT)
    runpy.run_path(str(TOOL), run_name="__main__")


main()
sys.exit(0)
