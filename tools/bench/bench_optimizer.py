"""Times the optimizer's update against its limit: reading the gradient, and reading and writing each state once.

    python tools/bench/bench_optimizer.py                                 # DiT-B/4's 131 million weights, one thread
    python tools/bench/bench_optimizer.py --parameters 20000000 --rounds 3
    python tools/bench/bench_optimizer.py --parameters 676000000          # XL/2's, on a GPU

Forms: one operation after the other on whole tensors; ours in pieces (a CPU without torch.compile) and compiled;
torch's fused AdamW, which keeps no EMA; and the limit, by copies into other tensors. Rounds are interleaved, one EMA.
Prints the median, the spread, and multiples of the limit.
"""

import argparse
import json
import statistics
import sys

from bench_measure import now

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path

SIZES = "parameters", "rounds", "threads"


def one_after_the_other(p, state, config):
    """The update as it is written in a paper: every operation passes over memory."""
    grad, exp_avg, exp_avg_sq, ema = p.grad, *state
    exp_avg.lerp_(grad, 1 - config.beta1)
    exp_avg_sq.mul_(config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
    root = (exp_avg_sq / (1 - config.beta2**10)).sqrt_().add_(config.eps)
    p.data.addcdiv_(exp_avg, root, value=-config.lr / (1 - config.beta1**10))
    ema.lerp_(p.data, 1 - config.ema_decay[0])


def forms(count, device):
    """name -> a call that updates all weights once."""
    import torch

    from mf_dist.config.schema import OptimConfig
    from mf_dist.training.optimizer import AdamWEma

    config = OptimConfig()
    p = torch.nn.Parameter(torch.randn(count, device=device))
    p.grad = torch.randn(count, device=device)
    pieces = AdamWEma([p], config)
    pieces.init_state(p)
    compiled = AdamWEma([p], config, compiles=True)
    compiled.state = pieces.state
    fused = torch.optim.AdamW([p], lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    state = [pieces.state[p][name] for name in pieces.states]
    target = torch.empty_like(p)

    def limit():
        p.grad.sum()
        for tensor in (p.data, *state):
            target.copy_(tensor)

    calls = {
        "limit": limit,
        "one after the other": lambda: one_after_the_other(p, state, config),
        "ours, in pieces": pieces.step,
        "ours, compiled": compiled.step,
        "torch, fused, no EMA": fused.step,
    }
    if device.type == "cuda":
        del calls["ours, in pieces"]  # a CPU's form
    return calls


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--parameters", type=int, default=131_000_000, help="weights (default 131 million)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default 1)")
    parser.add_argument("--json", type=expanded_path, help="also write the median seconds to this file")
    args = parser.parse_args()
    for name in SIZES:
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    import torch

    from mf_dist.runtime.compiler import require_compiler
    from mf_dist.runtime.distributed import choose_device

    device = choose_device(0)
    require_compiler(device)
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        calls = forms(args.parameters, device)
        for call in calls.values():
            call()  # compiles, allocates
        seconds = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                start = now()
                call()
                seconds[name].append(now() - start)
    limit = statistics.median(seconds["limit"])
    print(f"{args.parameters:,} weights, torch {torch.__version__}, {device}, {args.threads} thread(s) on a CPU")
    for name, taken in seconds.items():
        middle, spread = statistics.median(taken), f"{min(taken):.3f} to {max(taken):.3f}"
        print(f"{name:22}{middle:8.3f} s ({spread}), {middle / limit:5.2f} of the limit")
    if args.json:
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        args.json.write_text(json.dumps(medians), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
