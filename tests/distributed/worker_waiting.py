"""Run under a launcher: tools/fid_eval.py with a time limit of LIMIT seconds, where rank 0's distance takes longer; or,
after `alone`, rank 0 in a collective that the other rank never calls.

worker_waiting.py alone|ARGUMENTS OF tools/fid_eval.py
"""

import functools
import runpy
import sys
import time
from pathlib import Path

import torch

import mf_dist.evaluation.metrics
from mf_dist.runtime import distributed

LIMIT = 2.0
TOOL = Path(__file__).parents[2] / "tools/fid_eval.py"


def main():
    if sys.argv[1:] == ["alone"]:
        with distributed.process_group(LIMIT) as ranks:
            if ranks.is_rank_zero:
                distributed.sum_over_ranks(torch.ones(1))
            time.sleep(3 * LIMIT)
        return
    frechet_distance = mf_dist.evaluation.metrics.frechet_distance

    def slow(*gaussians):
        time.sleep(2 * LIMIT)
        return frechet_distance(*gaussians)

    mf_dist.evaluation.metrics.frechet_distance = slow
    distributed.process_group = functools.partial(distributed.process_group, LIMIT)
    runpy.run_path(str(TOOL), run_name="__main__")


main()
