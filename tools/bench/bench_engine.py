"""Times whole optimizer steps of a config without a dataset: the project's engine on random latents.

    python tools/bench/bench_engine.py configs/imagenet256_xl2.yaml train.batch_size=32
    python tools/bench/bench_engine.py configs/imagenet256_b4.yaml train.batch_size=128 --profile runs/bench
    torchrun --nproc_per_node=8 tools/bench/bench_engine.py configs/imagenet256_xl2.yaml

Prints the first step's seconds (compilation), then of --steps further ones the median, fastest and slowest in
milliseconds, MFU where the peak of the GPU is known (bf16), and the peak of memory. The data loader and checkpoints are
no part of it. --profile FOLDER records three more steps into FOLDER/profile, as train.profile_steps does; --weights
adds a hash of the weights at the end, to compare two calls.
"""

import argparse
import hashlib
import itertools
import json
import statistics
import sys
import time
from dataclasses import replace

from bench_measure import now

from mf_dist.config.cost import forward_flops, forwards_per_image, parameters
from mf_dist.config.schema import load_config, resolve
from mf_dist.report.curves import PEAKS
from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.launch import exit_without_finalization, rank_from_environment
from mf_dist.runtime.paths import expanded_path

WARM_UP, PROFILED, BATCHES = 5, 3, 4


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="YAML file; latents have the shape that its model section gives")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default 20)")
    parser.add_argument(
        "--profile", type=expanded_path, metavar="FOLDER", help="record 3 more steps into FOLDER/profile"
    )
    parser.add_argument("--weights", action="store_true", help="also the sha256 of the weights at the end")
    parser.add_argument("--json", type=expanded_path, help="also write the result to this file")
    args = parser.parse_intermixed_args()
    if args.steps < 1:
        raise UserError(f"--steps must be at least 1, got {args.steps}")
    return args


def random_batches(config, ranks):
    """A few micro-batches in pinned memory, as the data loader's; in place of moments they hold latents."""
    import numpy as np
    import torch
    from torch.utils.data._utils.pin_memory import pin_memory

    from mf_dist.data.loader import Batch
    from mf_dist.runtime import rng

    model, rows = config.model, config.train.micro_batch
    shape = (model.latent_channels, model.latent_size, model.latent_size)
    wanted, g = config.objective.draws(shape), torch.Generator().manual_seed(ranks.rank)
    for number in range(BATCHES):
        drawn = [rng.train_draws(ranks.rank, number * rows + i, wanted)[0] for i in range(rows)]
        draws = {name: torch.from_numpy(np.stack([row[name] for row in drawn])) for name in wanted}
        labels = torch.randint(0, max(1, model.num_classes), (rows,), generator=g)
        batch = Batch(torch.randn(rows, *shape, generator=g), labels, draws)
        yield pin_memory(batch) if ranks.device.type == "cuda" else batch


def measure(config, ranks, args):
    """What was measured, on this rank."""
    import torch

    from mf_dist.objectives.build import build_loss
    from mf_dist.sampling.generator import build_network
    from mf_dist.training.engine import Engine

    net = build_network(config.model, config.train.seed)
    engine = Engine(build_loss(net, config.objective), config, ranks)
    batches = itertools.cycle(list(random_batches(config, ranks)))
    schedule = torch.zeros((), device=ranks.device)

    def step():
        for _ in range(engine.accumulation):
            x, labels, draws = next(batches).to(ranks.device)
            engine.train_micro_batch(x, labels, draws, schedule)

    start = now()
    step()
    first_step = now() - start
    for _ in range(WARM_UP):
        step()
    times = [now()]
    for _ in range(args.steps - 1):  # the gradient guard waits for each step's norm, so no other wait is needed
        step()
        times.append(time.perf_counter())
    step()
    times.append(now())
    milliseconds = [1e3 * (end - before) for before, end in itertools.pairwise(times)]
    median, name = statistics.median(milliseconds), "CPU"
    images = config.train.micro_batch * engine.accumulation
    rate = forwards_per_image(config) * forward_flops(config.model) * images / median * 1e3
    result = {
        "torch": torch.__version__,
        "parameters": parameters(config.model),
        "images_per_rank": images,
        "first_step_s": first_step,
        "ms": median,
        "fastest_ms": min(milliseconds),
        "slowest_ms": max(milliseconds),
        "tflops": rate / 1e12,
        "graphs": engine.compiled(),
    }
    if ranks.device.type == "cuda":
        name = torch.cuda.get_device_name()
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        peak = next((peak for part, peak in PEAKS.items() if part in name), None)
        if peak and config.engine.precision == "bf16":
            result["mfu"] = rate / peak
    if args.profile:
        result |= profiled(step, args.profile, ranks)
    if args.weights:
        result["weights"] = hash_of_weights(engine)
    return {"device": name, **result}


def profiled(step, folder, ranks):
    """What the table of further steps says, on rank 0: the GPU's idle share, waits of the host, ms by class."""
    from mf_dist.training.profile import WARM_UP as UNRECORDED
    from mf_dist.training.profile import StepProfile

    profile = StepProfile(PROFILED, folder, ranks)
    for count in range(UNRECORDED + PROFILED):
        step()
        if profile.step():
            print(profile.write(count + 1), file=sys.stderr)
    if not ranks.is_rank_zero:
        return {}
    table = json.loads((folder / "profile/profile.json").read_text(encoding="utf-8"))
    return {
        "idle_share": table["idle_share"],
        "waits": sum(row["calls"] for row in table["waits"]),
        "ms_of": {row["name"]: row["ms"] for row in table["classes"]},
    }


def hash_of_weights(engine):
    from mf_dist.training.engine import MASTER

    digest = hashlib.sha256()
    for kind, _, tensor in engine.state():
        if kind == MASTER:
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@command_line
def main() -> None:
    args = parse()
    launched = rank_from_environment()
    config = load_config(args.config, args.overrides)
    config = resolve(replace(config, data=replace(config.data, path="none")), None, launched.world_size)
    from mf_dist.runtime.compiler import require_compiler
    from mf_dist.runtime.distributed import process_group, raise_on_all_ranks

    with process_group() as ranks:
        with raise_on_all_ranks(ranks):
            if config.engine.compile and ranks.is_local_rank_zero:
                require_compiler(ranks.device, "set engine.compile=false")
        result = measure(config, ranks, args)
    if launched.rank == 0:
        print(json.dumps(result))
        if args.json:
            args.json.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    exit_without_finalization(main())
