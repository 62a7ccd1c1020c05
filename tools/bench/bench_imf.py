"""Times a training step of improved MeanFlow, forward and backward, against the authors' form of it, in one run.

    python tools/bench/bench_imf.py                                # iMF-B/2's proportions, batch 4, compiled
    python tools/bench/bench_imf.py --model XL/2 --depth 24 --head-depth 4 --width 256 --heads 4
    python tools/bench/bench_imf.py --batch 32 --dtype bf16 --json bench.json      # on a GPU

`ours` is objectives/imf.py. `authors` is the loss of their code (github.com/Lyy-iiis/imeanflow, imf.py) on the same
network: the velocity in three passes on all rows, one torch.func.jvp of the whole batch with the v head as auxiliary
output. `plain` is flow matching through the u head alone. All are compiled, with the same weights and draws; the first
two give the same loss, which is checked first. Rounds are interleaved; medians, and the spread of each round's ratio.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace

from bench_measure import counted_flops, now, peak_bytes, saved_bytes

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path

VARIANTS = ("plain", "ours", "authors")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="B/2", help="iMF's B/2, M/2, L/2, XL/2 (default B/2)")
    parser.add_argument("--depth", type=int, help="fewer blocks than the model has, for quick runs")
    parser.add_argument("--head-depth", type=int, help="of these, in a head")
    parser.add_argument("--width", type=int, help="narrower than the model")
    parser.add_argument("--heads", type=int, help="heads of attention, with --width")
    parser.add_argument("--batch", type=int, default=4, help="rows, even (default 4)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: quieter)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the layers (default fp32)")
    parser.add_argument("--json", type=expanded_path, help="also write the results to this file")
    args = parser.parse_args()
    if args.batch < 2 or args.batch % 2 or args.rounds < 1 or args.threads < 1:
        raise UserError("--batch must be even, --rounds and --threads at least 1")
    if args.json:
        args.json.touch()  # fails now if the file cannot be written
    return args


def plain(net, x, e, r, t, y, guidance, n_eq, null_label, recipe):
    z, v = path_of(x, e, t)
    return (net(z, t, t, y, guidance) - v).square().sum(dim=(1, 2, 3)).mean()


def ours(*inputs):
    from mf_dist.objectives.imf import imf_loss

    return imf_loss(*inputs)[0]


def authors(net, x, e, r, t, y, guidance, n_eq, null_label, recipe):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from mf_dist.models.imf_dit import Guidance
    from mf_dist.objectives.path import per_row
    from mf_dist.objectives.weighting import adaptive

    z, v = path_of(x, e, t)
    is_equal, zeros, ones = torch.arange(len(t), device=t.device) < n_eq, torch.zeros_like(t), torch.ones_like(t)
    inside = (guidance.start <= t) & (t <= guidance.end)
    omega = torch.where(inside, guidance.omega, 1.0)
    with torch.no_grad():
        twice = [torch.cat([a, a]) for a in (z, t, zeros, ones)]
        scales, labels = torch.cat([guidance.omega, ones]), torch.cat([y, torch.full_like(y, null_label)])
        both = net(twice[0], twice[1], twice[1], labels, Guidance(scales, twice[2], twice[3]), head="v")
        v_c, v_u = both.chunk(2)
        v_g_fm = v + per_row(1 - 1 / guidance.omega) * (v_c - v_u)
        v_c = net(z, t, t, y, Guidance(omega, zeros, ones), head="v")
        v_g = v + per_row(1 - 1 / omega) * (v_c - v_u)
        v_g = torch.where(per_row(is_equal), v_g_fm, v_g)
        v_g = torch.where(per_row(y == null_label), v, v_g)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
        u, du_dt, v_head = torch.func.jvp(
            lambda z, t, r: net(z, r, t, y, guidance, head="both"), (z, t, r), (v_c, ones, zeros), has_aux=True
        )
    rows = (u + per_row(t - r) * du_dt.detach() - v_g, v_head - v_g)
    return sum(adaptive(a.square().sum(dim=(1, 2, 3)), recipe.adaptive_eps, recipe.adaptive_p) for a in rows).mean()


def path_of(x, e, t):
    from mf_dist.objectives.path import path

    return path(x, e, t)


class Case:
    """A variant: its loss, compiled, and its measured seconds."""

    def __init__(self, loss, net, inputs):
        import torch

        self.loss, self.net, self.inputs, self.seconds = loss, net, inputs, []
        self.call = torch.compile(self.value, fullgraph=True, dynamic=False)

    def value(self):
        return self.loss(self.net, *self.inputs)

    def step(self):
        """Seconds of one forward and backward."""
        start = now()
        self.call().backward()
        seconds = now() - start
        self.net.zero_grad(set_to_none=True)
        return seconds


def build_cases(args, device):
    import torch

    from mf_dist.config.objectives import ImfConfig
    from mf_dist.models.imf_dit import Guidance
    from mf_dist.models.sizes import named_imf_dit
    from mf_dist.objectives.guidance import sample_interval, sample_omega
    from mf_dist.objectives.times import sample_times
    from mf_dist.sampling.generator import build_network

    try:
        model = named_imf_dit(args.model, 32)
    except (KeyError, ValueError):
        raise UserError(f"--model {args.model!r}: expected B/2, M/2, L/2 or XL/2") from None
    changes = {"depth": args.depth, "hidden_size": args.width, "num_heads": args.heads}
    model = replace(model, **{name: value for name, value in changes.items() if value})
    if args.head_depth:
        model = replace(model, imf_dit=replace(model.imf_dit, head_depth=args.head_depth))
    net, g = build_network(model, 0), torch.Generator().manual_seed(0)
    for p in net.parameters():  # at the initial weights du/dt is 0
        p.data.add_(torch.randn(p.shape, generator=g) * 0.01)
    net.to(device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    n_eq = args.batch // 2
    x, e = torch.randn(2, args.batch, 4, 32, 32, generator=g).to(device)
    r, t = sample_times(torch.randn(args.batch, 2, generator=g).to(device), n_eq, -0.4, 1.0)
    y = torch.randint(0, 1000, (args.batch,), generator=g).to(device)
    omega = sample_omega(torch.rand(args.batch, generator=g).to(device), 8.0, 1.0)
    guidance = Guidance(omega, *sample_interval(torch.rand(args.batch, 2, generator=g).to(device), n_eq))
    inputs = (x, e, r, t, y, guidance, n_eq, net.null_label, ImfConfig())
    return {name: Case(globals()[name], net, inputs) for name in VARIANTS}, model


def check_same_loss(cases, dtype):
    """Raises UserError unless both forms have the same loss, unweighted: the weighted one is 2 by construction."""
    import torch

    with torch.no_grad():
        ours, authors = (
            case.loss(case.net, *case.inputs[:-1], replace(case.inputs[-1], adaptive_p=0.0)).item()
            for case in (cases["ours"], cases["authors"])
        )
    if not abs(authors / ours - 1) <= (2e-2 if dtype == "bf16" else 1e-4):
        raise UserError(f"the authors' form computes another loss than ours: {authors} and {ours}")


def rms_norm(x, shape, weight, eps):
    """In fp32, as the kernel computes it: of bf16 values torch's forward mode makes fp32 tangents on a GPU."""
    import torch

    return (torch.rms_norm(x.float(), shape, None, eps) * weight.float()).to(x.dtype)


@command_line
def main() -> None:
    args = parse()
    import torch

    from mf_dist.config.cost import forward_flops
    from mf_dist.runtime.compiler import require_compiler

    torch.set_num_threads(args.threads)
    if args.dtype == "bf16":
        torch.nn.functional.rms_norm = rms_norm  # in all variants
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require_compiler(device)
    cases, model = build_cases(args, device)
    check_same_loss(cases, args.dtype)
    for case in cases.values():
        case.step(), case.step()
    for _ in range(args.rounds):
        for case in cases.values():
            case.seconds.append(case.step())
    one, both = forward_flops(model), forward_flops(model, both_heads=True)
    print(f"{vars(args)} torch {torch.__version__}, {device}; both heads cost {both / one:.3f} of one")
    print(f"{'variant':10}{'median s':>9}{'/ authors':>10}{'spread':>14}{'saved MB':>10}{'peak MB':>9}{'forwards':>10}")
    results = {}
    for name, case in cases.items():
        ratios = [a / b for a, b in zip(case.seconds, cases["authors"].seconds, strict=True)]
        result = {
            "median_seconds": statistics.median(case.seconds),
            "of_authors": statistics.median(ratios),
            "fastest": min(ratios),
            "slowest": max(ratios),
            "saved_bytes": saved_bytes(case),
            "peak_bytes": peak_bytes(case),
            "forwards": counted_flops(case) / args.batch / one,
        }
        spread = f"{result['fastest']:.2f}-{result['slowest']:.2f}"
        print(
            f"{name:10}{result['median_seconds']:9.3f}{result['of_authors']:10.3f}{spread:>14}"
            f"{result['saved_bytes'] / 1e6:10.0f}{result['peak_bytes'] / 1e6:9.0f}{result['forwards']:10.2f}"
        )
        results[name] = result
    if args.json:
        args.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
