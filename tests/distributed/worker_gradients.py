"""One rank that computes one optimizer step's full gradient and first moment on real batches, written by rank 0.

    worker_gradients.py CONFIG OUT [section.key=value ...]

Then two more steps, a state that is loaded and read again, and on stdout how often torch.compile broke a graph in the
first step and compiled after it.
"""

import json
import sys

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file
from torch._dynamo.utils import counters

from mf_dist.config.schema import load_config, resolve
from mf_dist.data.loader import Batch, training_batches
from mf_dist.data.normalisation import normalisation
from mf_dist.data.shards import LatentShards
from mf_dist.objectives.build import build_loss
from mf_dist.runtime.distributed import process_group
from mf_dist.runtime.launch import exit_without_finalization
from mf_dist.sampling.generator import build_network
from mf_dist.training import data_parallel
from mf_dist.training.engine import Engine

data_parallel.BLOCKS_TOGETHER = 1000  # so that a small network has several groups


def main():
    path, out, *overrides = sys.argv[1:]
    with process_group() as ranks:
        config = load_config(path, overrides)
        shards = LatentShards(config.data.path)
        config = resolve(config, shards.manifest, ranks.world_size)
        net = build_network(config.model, 0)
        g, scale = torch.Generator().manual_seed(1), 1.1 / config.model.hidden_size**0.5
        for p in net.parameters():  # at the model's initial weights most gradients are 0
            p.data.copy_(torch.randn(p.shape, generator=g) * (scale if p.ndim > 1 else 0.05))
        loss = build_loss(net, config.objective)
        loss.phase = config.objective.phase(0.5).name
        engine = Engine(loss, config, ranks)
        batches = training_batches(shards, config, 0, ranks.rank, ranks.world_size, False)
        inner = engine._engine
        scale = normalisation(config.data, shards.manifest["vae"], ranks.device)

        def inputs(b: Batch):
            x = scale.sample_posterior(b.moments, b.draws.pop("posterior_noise"))
            return x, b.labels, b.draws, torch.tensor(config.objective.schedule(0.5))

        step, gradient = inner.step, {}

        def step_recording_gradient():
            if inner.is_gradient_accumulation_boundary() and not gradient:
                gradient.update((name, safe_get_full_grad(p).float().clone()) for name, p in net.named_parameters())
            step()

        inner.step = step_recording_gradient
        for _ in range(engine.accumulation):
            engine.train_micro_batch(*inputs(next(batches)))
        moments = {f"exp_avg/{name}": a.contiguous() for kind, name, a in engine.state() if kind == "exp_avg"}
        if ranks.is_rank_zero:
            save_file(gradient | moments, out)
        norm = engine.grad_norm()
        breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
        for _ in range(2 * engine.accumulation):
            engine.train_micro_batch(*inputs(next(batches)))
        doubled = {(kind, name): 2 * a for kind, name, a in engine.state()}
        for kind in engine.kinds:
            engine.load_state(kind, [(name, a) for (of, name), a in doubled.items() if of == kind])
        assert all(torch.equal(a, doubled[kind, name]) for kind, name, a in engine.state()), "state is not loaded"
        if ranks.is_rank_zero:
            later = counters["stats"]["unique_graphs"] - graphs
            print(json.dumps({"graphs": graphs, "breaks": breaks, "compiled_later": later, "norm": norm}))


if __name__ == "__main__":
    main()
    exit_without_finalization(0)
