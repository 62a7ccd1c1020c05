"""One rank of a step with one injected fault, which the engine's start-up checks must detect.

worker_faults.py CONFIG weights|gradients|nothing [section.key=value ...]
"""

import sys

import deepspeed.comm
import torch

from mf_dist.config.schema import load_config, resolve
from mf_dist.data.shards import LatentShards
from mf_dist.objectives.build import build_loss
from mf_dist.runtime.distributed import process_group
from mf_dist.runtime.errors import command_line
from mf_dist.runtime.launch import exit_without_finalization
from mf_dist.sampling.generator import build_network
from mf_dist.training.engine import Engine


@command_line
def main():
    path, fault, *overrides = sys.argv[1:]
    with process_group() as ranks:
        config = load_config(path, overrides)
        config = resolve(config, LatentShards(config.data.path).manifest, ranks.world_size)
        net = build_network(config.model, 0)
        if fault == "weights" and ranks.rank == 1:
            net.blocks[1].mlp.fc1.bias.data[3] = 1e-6
        engine = Engine(build_loss(net, config.objective), config, ranks)
        if fault == "gradients":  # like a reduction that never happens
            for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter_fn"):
                setattr(deepspeed.comm, name, lambda *a, **k: None)
        g = torch.Generator().manual_seed(ranks.rank)
        shape = (config.train.micro_batch, config.model.latent_channels, *[config.model.latent_size] * 2)
        for _ in range(engine.accumulation):
            e, normals = torch.randn(shape, generator=g), torch.randn(shape[0], 2, generator=g)
            draws = {"e": e, "time_normals": normals, "drop_uniforms": torch.ones(shape[0])}
            x, labels = torch.randn(shape, generator=g), torch.zeros(shape[0], dtype=torch.long)
            engine.train_micro_batch(x, labels, draws, torch.zeros(()))


if __name__ == "__main__":
    exit_without_finalization(main())
