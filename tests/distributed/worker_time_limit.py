"""Run under a launcher: rank 0 prints the time limits, in seconds, of the world group and of DeepSpeed's copy of it.

worker_time_limit.py CONFIG [section.key=value ...]
"""

import json
import sys

import deepspeed
import torch.distributed as dist

from mf_dist.config.schema import load_config, resolve
from mf_dist.data.shards import LatentShards
from mf_dist.fault_tolerance.watchdog import process_group_timeout
from mf_dist.objectives.build import build_loss
from mf_dist.runtime.distributed import process_group
from mf_dist.runtime.launch import exit_without_finalization
from mf_dist.sampling.generator import build_network
from mf_dist.training.engine import Engine


def main():
    config = load_config(sys.argv[1], sys.argv[2:])
    with process_group(process_group_timeout(config.train.hang_seconds)) as ranks:
        config = resolve(config, LatentShards(config.data.path).manifest, ranks.world_size)
        net = build_network(config.model, 0)
        Engine(build_loss(net, config.objective), config, ranks)
        groups = dist.group.WORLD, deepspeed.utils.groups._clone_world_group()
        if ranks.is_rank_zero:
            print(json.dumps([g._get_backend(ranks.device).options._timeout.total_seconds() for g in groups]))


if __name__ == "__main__":
    main()
    exit_without_finalization(0)
