"""Times a training step's forward and backward against other implementations, in one run, interleaved.

    python tools/bench/bench_step.py                             # DiT-B/4, batch 4: plain, ours, authors; compiled
    python tools/bench/bench_step.py --variants all --eager --json bench.json
    python tools/bench/bench_step.py --model XL/2 --batch 32 --dtype bf16          # on a GPU

`ours` is compiled as one graph, `blocks` is the same step compiled block by block. Ratios are to `plain`: flow
matching (forward and backward, 3 F) by a DiT without tangent code, fused attention, same batch and threads. Each round
runs every variant once; medians over the rounds, and the spread of each round's ratio. Saved bytes are what the forward
keeps for the backward, peak bytes what forward and backward hold at most beyond weights and inputs; FLOPs are counted
by torch on the eager form. `diffusers` is `plain` with attention and MLP from diffusers.

`boundary`, `discrete` and `trajectory` are other targets on the network of `ours`: MeanFlow's boundary tangent, the
discrete target of SoFlow and alpha-Flow, and alpha-Flow's first phase, which has no second forward.
"""

import argparse
import json
import statistics
import sys
from fractions import Fraction

from bench_measure import counted_flops, matmul_peak, now, peak_bytes, saved_bytes

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path

OTHER_TARGETS = ("boundary", "discrete", "trajectory")
ONE_TARGET = ("plain", "diffusers", "ours", "blocks", "authors", "port", "tim")
VARIANTS = (*ONE_TARGET, *OTHER_TARGETS)
UNGUIDED = ("plain", "diffusers")
HEADS = {"median s": 9, "ratio": 7, "spread": 14, "saved": 7, "peak": 7, "FLOPs": 7, "1st, s": 8}
KAPPA = {"guided": 0.5, "unguided": 0.0}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="B/4", help="B/4, B/2, M/2, L/2, XL/2, XXL/2, G/2 (default B/4)")
    parser.add_argument("--depth", type=int, help="fewer blocks than the model has, for quick runs")
    parser.add_argument("--batch", type=int, default=4, help="rows, a multiple of 4 (default 4)")
    parser.add_argument("--resolution", type=int, default=256, help="side of the images; latents are 1/8 (default 256)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: quieter)")
    parser.add_argument(
        "--variants", default="plain,ours,authors", help=f"of {', '.join(VARIANTS)}; all: {', '.join(ONE_TARGET)}"
    )
    parser.add_argument("--guidance", choices=("both", "guided", "unguided"), default="both")
    parser.add_argument("--eager", action="store_true", help="measure the uncompiled forms too")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the layers (default fp32)")
    parser.add_argument("--json", type=expanded_path, help="also write the results to this file")
    args = parser.parse_args()
    args.variants = ONE_TARGET if args.variants == "all" else tuple(args.variants.split(","))
    unknown = [name for name in args.variants if name not in VARIANTS]
    if unknown or "plain" not in args.variants:
        raise UserError(
            f"--variants: expected plain and any of {', '.join(VARIANTS[1:])}, got {','.join(args.variants)}"
        )
    if args.batch < 4 or args.batch % 4 or args.rounds < 1 or args.threads < 1 or args.resolution % 8:
        raise UserError("--batch must be a multiple of 4, --resolution of 8, --rounds and --threads at least 1")
    if args.json:
        args.json.touch()  # fails now if the file cannot be written
    return args


class Case:
    """One variant: its network, its loss, compiled or not; and its measured seconds."""

    def __init__(self, name, guidance, compiled, net, loss, inputs, recipe):
        import torch

        self.name, self.guidance, self.compiled, self.net, self.loss = name, guidance, compiled, net, loss
        self.inputs, self.recipe, self.seconds = inputs, recipe, []
        self.call = self.value
        if compiled and name == "blocks":
            for block in net.blocks:
                block.compile(fullgraph=True, dynamic=False)
        elif compiled:
            self.call = torch.compile(self.value, fullgraph=True, dynamic=False)

    def value(self):
        return self.loss(self.net, *self.inputs, len(self.inputs[0]) * 3 // 4, self.net.null_label, self.recipe)

    def step(self):
        """Seconds of one forward and backward."""
        import torch

        start = now()
        torch.manual_seed(0)
        self.call().backward()
        seconds = now() - start
        self.net.zero_grad(set_to_none=True)
        return seconds


def build_cases(args, device):
    """All requested variants with the same random weights and draws."""
    import torch
    from bench_peers import authors, plain, port, tim

    from mf_dist.config.objectives import MeanFlowConfig
    from mf_dist.models.sizes import named_model
    from mf_dist.objectives.meanflow import meanflow_loss
    from mf_dist.objectives.times import sample_times

    losses = {"plain": plain, "diffusers": plain, "authors": authors, "port": port, "tim": tim}
    losses |= dict.fromkeys(("ours", "blocks", "boundary"), lambda *a: meanflow_loss(*a)[0])
    try:
        model = named_model(args.model, args.resolution // 8)
    except (KeyError, ValueError):
        raise UserError(f"--model {args.model!r}: expected such as B/4, B/2, M/2, L/2, XL/2, XXL/2, G/2") from None
    nets, g = build_nets(model, args, device)

    def loss_of(name, kappa):
        is_alpha_flow = name in ("discrete", "trajectory")
        return alpha_flow(nets["ours"], name, kappa, args.dtype == "bf16") if is_alpha_flow else losses[name]

    x, e = torch.randn(2, args.batch, 4, model.latent_size, model.latent_size, generator=g).to(device)
    r, t = sample_times(torch.randn(args.batch, 2, generator=g).to(device), args.batch * 3 // 4, -0.4, 1.0)
    y = torch.randint(0, 1000, (args.batch,), generator=g).to(device)
    net_names = dict.fromkeys(OTHER_TARGETS, "ours") | {
        "plain": "fused",
        "tim": "fused",
        "authors": "jvp",
        "port": "jvp",
    }
    return [
        Case(
            name,
            guidance,
            compiled,
            nets[net_names.get(name, name)],
            loss_of(name, kappa),
            (x, e, r, t, y),
            MeanFlowConfig(kappa=kappa, tangent="boundary" if name == "boundary" else "guided"),
        )
        for compiled in ((True, False) if args.eager else (True,))
        for guidance, kappa in KAPPA.items()
        if args.guidance in ("both", guidance)
        for name in args.variants
        if (compiled or name != "blocks")
        and (name not in UNGUIDED or guidance == ("unguided" if args.guidance != "guided" else "guided"))
    ]


def alpha_flow(net, phase, kappa, in_bf16):
    """The loss of a phase of alpha-Flow, at 75 % of r = t rows, with draws of its own."""
    import torch

    from mf_dist.config.objectives import AlphaFlowConfig
    from mf_dist.objectives.alpha_flow import AlphaFlowLoss

    config = AlphaFlowConfig(Fraction(3, 4), kappa=kappa)
    module = AlphaFlowLoss(net, config)
    module.phase = {"discrete": config.DISCRETE, "trajectory": config.TRAJECTORY}[phase]
    module.in_bf16 = in_bf16

    def loss(net, x, e, r, t, y, n_eq, null_label, recipe):
        draws = {"e": e, "time_normals": torch.stack([t, r], dim=1), "drop_uniforms": t}
        return module(x, y, draws, torch.full((), 0.5, device=x.device))[0]

    return loss


def build_nets(model, args, device):
    """Our DiT and plain ones with the same random weights, and the generator that drew them."""
    import torch
    from bench_peers import DiffusersDiT, PlainDiT

    from mf_dist.models.dit import DiT

    g = torch.Generator().manual_seed(0)
    sizes = {
        "latent_size": model.latent_size,
        "latent_channels": 4,
        "num_classes": 1000,
        "patch_size": model.patch_size,
        "hidden_size": model.hidden_size,
        "depth": args.depth or model.depth,
        "num_heads": model.num_heads,
    }
    ours = DiT(**sizes, generator=g)
    for p in ours.parameters():  # at initial weights du/dt is 0
        p.data.add_(torch.randn(p.shape, generator=g) * 0.01)
    nets = {
        "ours": ours,
        "blocks": DiT(**sizes, generator=g),
        "fused": PlainDiT(**sizes, plain_attention=False, generator=g),
        "jvp": PlainDiT(**sizes, plain_attention=True, generator=g),
        "diffusers": DiffusersDiT(**sizes, generator=g),
    }
    for name, net in nets.items():
        if name != "diffusers":  # its layers have other names; only its time is compared
            net.load_state_dict(ours.state_dict())
        net.to(device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    return nets, g


def check_same_loss(cases):
    """Raises UserError unless all variants compute the loss of `ours`: other times would not be comparable."""
    import torch

    for guidance in KAPPA:
        losses = {
            c.name: c.value().item()
            for c in cases
            if c.guidance == guidance and c.name not in (*UNGUIDED, *OTHER_TARGETS)
        }
        reference = losses.get("ours")
        for name, loss in losses.items():
            # the weighted loss is near 1 by construction: compare its difference from 1
            tolerance = 0.2 if name == "tim" or torch.bfloat16 in {p.dtype for p in cases[0].net.parameters()} else 1e-3
            if reference is not None and abs((1 - loss) / (1 - reference) - 1) > tolerance:
                raise UserError(f"{name} computes another loss than ours ({guidance}): {loss} and {reference}")


def measure(cases, rounds):
    first = {}
    for case in cases:
        first[id(case)] = case.step()
        print(
            f"  first step of {case.name} {case.guidance} {'compiled' if case.compiled else 'eager'}: "
            f"{first[id(case)]:.1f} s",
            file=sys.stderr,
        )
        case.step()
    for _ in range(rounds):
        for case in cases:
            case.seconds.append(case.step())
    return first


def report(cases, first, args, device):
    import torch

    plain = {case.compiled: case for case in cases if case.name == "plain"}
    peak = matmul_peak(device, args.dtype) if device.type == "cuda" else None
    rows = []
    for case in cases:
        ratios = [a / b for a, b in zip(case.seconds, plain[True].seconds, strict=True)]
        flops, seconds = counted_flops(case), statistics.median(case.seconds)
        rows.append(
            {
                "variant": case.name,
                "guidance": None if case.name in UNGUIDED else case.guidance,
                "compiled": case.compiled,
                "median_seconds": seconds,
                "ratio": statistics.median(ratios),
                "ratio_spread": [min(ratios), max(ratios)],
                "saved_bytes": saved_bytes(case),
                "peak_bytes": peak_bytes(case),
                "flops": flops,
                "mfu": flops / seconds / peak if peak else None,
                "first_step_seconds": first[id(case)],
            }
        )
    setting = {
        "model": args.model,
        "depth": args.depth,
        "batch": args.batch,
        "resolution": args.resolution,
        "rounds": args.rounds,
        "threads": args.threads,
        "dtype": args.dtype,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "matmul_peak_flops": peak,
    }
    ratios = {
        f"{row['variant']} {row['guidance']}": row["ratio"] for row in rows if row["compiled"] and row["guidance"]
    }
    return {"setting": setting, "ratios": ratios, "results": rows}


def print_table(result):
    base = next(row for row in result["results"] if row["variant"] == "plain" and row["compiled"])
    print(f"\n{json.dumps(result['setting'])}")
    numbers = "".join(f"{head:>{width}}" for head, width in HEADS.items())
    print(f"{'variant':12}{'guidance':10}{'form':10}{numbers}")
    for row in result["results"]:
        spread = "{:.2f}-{:.2f}".format(*row["ratio_spread"])
        saved, peak, flops = (row[key] / base[key] for key in ("saved_bytes", "peak_bytes", "flops"))
        print(
            f"{row['variant']:12}{row['guidance'] or '-':10}{'compiled' if row['compiled'] else 'eager':10}"
            f"{row['median_seconds']:9.3f}{row['ratio']:7.2f}{spread:>14}{saved:7.2f}{peak:7.2f}{flops:7.2f}"
            f"{row['first_step_seconds']:8.1f}" + (f"{row['mfu']:6.2f}" if row["mfu"] else "")
        )


@command_line
def main() -> None:
    args = parse()
    import torch

    from mf_dist.runtime.compiler import require_compiler

    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64  # every case is the same method to dynamo
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require_compiler(device)
    cases = build_cases(args, device)
    check_same_loss(cases)
    result = report(cases, measure(cases, args.rounds), args, device)
    print_table(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
