"""Overlap of communication and compute in a data-parallel step, on two ranks joined by a slow link.

    python tools/bench/bench_overlap.py --ready
    sudo python tools/bench/bench_overlap.py --mbit 200

--ready: when the backward completes the gradients of the first and of the last block, as a share of its duration, with
the step compiled as one graph and block by block. One process.

Otherwise two ranks in network namespaces of their own, whose link tc limits to so many Mbit/s in each direction. Each
round measures one step with overlap (as in training) and one without (all gradients are reduced after the backward, all
weights gathered before the next step). Prints medians and ranges, and the bytes that passed the link.
Needs root, ip and tc; ZeRO-1 in bf16 on CPUs, one thread per rank.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter as now

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path

CONFIG = "configs/digits_cpu.yaml"
SHAPE = {"latent_size": 16, "latent_channels": 4, "num_classes": 10}
NAMESPACES, INTERFACE = ("mf-overlap-0", "mf-overlap-1"), "overlap0"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ready", action="store_true", help="when gradients are ready, without a link")
    parser.add_argument("--mbit", type=int, default=200, help="rate of the link in each direction")
    parser.add_argument("--depth", type=int, default=8, help="blocks")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rows", type=int, default=16, help="images per rank and step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=expanded_path, help="also write the figures to this file")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(args, ranks):
    """The engine, and a function that makes one micro-batch of random latents."""
    import torch

    from mf_dist.config.schema import load_config, resolve
    from mf_dist.objectives.build import build_loss
    from mf_dist.sampling.generator import build_network
    from mf_dist.training import data_parallel
    from mf_dist.training.engine import Engine

    data_parallel.BLOCKS_TOGETHER = 1_000_000  # as many parts as there are blocks, as in DiT-XL/2
    batch = args.rows * ranks.world_size
    shape = [f"model.{name}={value}" for name, value in SHAPE.items()]
    shape += [f"model.depth={args.depth}", f"model.hidden_size={args.width}", "model.num_heads=6", "model.patch_size=2"]
    options = [
        "engine.precision=bf16",
        "engine.compile=true",
        f"train.batch_size={batch}",
        "train.total_images=1000000",
    ]
    config = load_config(CONFIG, [*shape, *options, "eval.every_images=0"])
    config = resolve(replace(config, data=replace(config.data, path="none")), None, ranks.world_size)
    net, g = build_network(config.model, 0), torch.Generator().manual_seed(ranks.rank)
    engine = Engine(build_loss(net, config.objective), config, ranks)
    latent = (args.rows, SHAPE["latent_channels"], SHAPE["latent_size"], SHAPE["latent_size"])

    def micro_batch():
        x, e = torch.randn(latent, generator=g), torch.randn(latent, generator=g)
        y = torch.randint(0, SHAPE["num_classes"], (args.rows,), generator=g)
        normals, uniforms = torch.randn(args.rows, 2, generator=g), torch.rand(args.rows, generator=g)
        return x, y, {"e": e, "time_normals": normals, "drop_uniforms": uniforms}, torch.zeros(())

    return engine, net, micro_batch


def measure_ready(args):
    """{form: {"first block": share, "last block": share, "backward_s": seconds}}: medians over the rounds."""
    import torch

    from mf_dist.runtime.distributed import Ranks, process_group
    from mf_dist.training import engine as engines

    result = {}
    with process_group():
        for form, world_size in (("one graph", 1), ("block by block", 2)):
            compile_loss = engines._compile

            def compiled(*arguments, world_size=world_size, compile_loss=compile_loss):
                compile_loss(*arguments[:-1], world_size)

            engines._compile = compiled
            engine, net, micro_batch = build(args, Ranks(0, 1, torch.device("cpu")))
            engines._compile = compile_loss
            times = {}
            for name, block in (("first block", net.blocks[0]), ("last block", net.blocks[-1])):
                for p in block.parameters():
                    p.register_post_accumulate_grad_hook(lambda _, name=name, times=times: times.update({name: now()}))
            backward, shares = engine._engine.backward, []

            def timed(loss, backward=backward, times=times, shares=shares):
                start = now()
                backward(loss)
                seconds = now() - start
                shares.append(
                    {name: (time - start) / seconds for name, time in times.items()} | {"backward_s": seconds}
                )

            engine._engine.backward = timed
            for _ in range(args.rounds + 2):
                engine.train_micro_batch(*micro_batch())
            torch._dynamo.reset()
            result[form] = {name: round(median(share[name] for share in shares[2:]), 3) for name in shares[0]}
    return result


def rank_main(args):
    """One rank: prints the seconds of each step, as one JSON line, on rank 0."""
    import torch

    from mf_dist.runtime.distributed import process_group
    from mf_dist.runtime.launch import exit_without_finalization

    torch.set_num_threads(1)
    with process_group() as ranks:
        engine, net, micro_batch = build(args, ranks)
        parallel, seconds, sent = engine._data_parallel, {"overlap": [], "no overlap": []}, {}
        for number in range(2 * (args.rounds + 2)):
            overlaps = number % 2 == 0
            parallel._accumulation = 1 if overlaps else 0  # 0: no micro-batch is the last, so that none reduces
            torch.distributed.barrier()
            before, start = bytes_sent(), now()
            engine.train_micro_batch(*micro_batch())
            if not overlaps:
                parallel.wait_for_weights()
            # the next forward, whose first block waits for its weights
            engine.train_micro_batch(*micro_batch())
            parallel.wait_for_weights()
            seconds["overlap" if overlaps else "no overlap"].append((now() - start) / 2)
            sent = (bytes_sent() - before) / 2
        count = sum(p.numel() for p in net.parameters())
        if ranks.is_rank_zero:
            print(json.dumps({"parameters": count, "sent": sent, **{k: v[2:] for k, v in seconds.items()}}), flush=True)
    exit_without_finalization(0)


def bytes_sent():
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def run(*command):
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is missing: install iproute2") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"{' '.join(command)}: {error.stderr.strip()}; run as root") from None


def make_link(mbit):
    for name in NAMESPACES:
        run("ip", "netns", "add", name)
    first, second = NAMESPACES
    run("ip", "-n", first, "link", "add", "name", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
    for number, name in enumerate(NAMESPACES):
        run("ip", "-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", INTERFACE)
        for interface in (INTERFACE, "lo"):
            run("ip", "-n", name, "link", "set", interface, "up")
        limit = ["rate", f"{mbit}mbit", "burst", "256kb", "latency", "100ms"]
        run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit)


def remove_link():
    for name in NAMESPACES:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def measure_link(args):
    """Runs both ranks; their figures."""
    remove_link()
    try:
        make_link(args.mbit)
        processes = []
        for rank, name in enumerate(NAMESPACES):
            environment = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
            environment |= {
                "CUDA_VISIBLE_DEVICES": -1,
                "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": 29500,
                "GLOO_SOCKET_IFNAME": INTERFACE,
            }
            command = ["ip", "netns", "exec", name, sys.executable, __file__, *sys.argv[1:], "--rank", str(rank)]
            environment = os.environ | {key: str(value) for key, value in environment.items()}
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise UserError("a rank failed, see above")
    finally:
        remove_link()
    return json.loads(outputs[0].splitlines()[-1])


@command_line
def main():
    args = parse_args()
    if args.rank is not None:
        rank_main(args)
    import torch

    from mf_dist.runtime.compiler import require_compiler

    require_compiler(torch.device("cpu"))
    result = measure_ready(args) if args.ready else measure_link(args)
    if args.ready:
        for form, shares in result.items():
            print(f"{form:15} " + ", ".join(f"{name} {value}" for name, value in shares.items()))
    else:
        for form in ("overlap", "no overlap"):
            steps = result[form]
            print(f"{form:11} {median(steps):.3f} s per step ({min(steps):.3f} to {max(steps):.3f})")
        per_number = result["sent"] / result["parameters"]
        print(f"{result['parameters']:,} parameters, {per_number:.2f} bytes sent per rank and parameter")
        print(f"ratio {median(result['overlap']) / median(result['no overlap']):.2f}")
    if args.json:
        args.json.write_text(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
