"""Times the attention of the target pass, value and tangent: the fused kernel against the plain compiled form.

    python tools/bench/bench_attention.py                              # XL's heads at 256 to 4096 tokens
    python tools/bench/bench_attention.py --heads 12 --size 64 --rows 32

Needs a CUDA GPU. bf16, interleaved, medians over the rounds; memory is what the call allocates beyond its inputs.
The fused kernel pays from the token count at which the ratio of times falls below 1: FUSED_FROM_TOKENS in
mf_dist/models/attention.py.
"""

import argparse
import json
import statistics
import sys
import time

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", type=int, default=8, help="r < t rows (default 8: a quarter of 32)")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--size", type=int, default=72, help="head size (default 72: XL)")
    parser.add_argument("--tokens", default="256,512,1024,2048,4096", help="token counts, comma-separated")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=expanded_path, help="also write the results to this file")
    args = parser.parse_args()
    if not all(text.isdigit() and int(text) for text in args.tokens.split(",")):
        raise UserError(f"--tokens {args.tokens!r}: expected whole numbers such as 256,1024")
    if min(args.rows, args.heads, args.size, args.rounds) < 1:
        raise UserError("--rows, --heads, --size and --rounds must be at least 1")
    import torch

    from mf_dist.runtime.compiler import require_compiler

    if not torch.cuda.is_available():
        raise UserError("the fused kernel runs on a CUDA GPU, and torch finds none")
    require_compiler(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args}")
    print(
        f"{'tokens':>8}{'plain ms':>10}{'fused ms':>10}{'ratio':>7}{'spread':>14}{'plain MiB':>11}{'fused MiB':>11}"
        f"{'error':>10}"
    )
    results = {}
    for tokens in map(int, args.tokens.split(",")):
        row = compare(args, tokens)
        ratios = [f / p for p, f in zip(*row["ms"], strict=True)]
        plain, fused = (statistics.median(ms) for ms in row["ms"])
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(
            f"{tokens:8}{plain:10.3f}{fused:10.3f}{statistics.median(ratios):7.2f}{spread:>14}"
            f"{row['mib'][0]:11.1f}{row['mib'][1]:11.1f}{row['error']:10.1e}"
        )
        results[f"{tokens} tokens"] = {"plain_ms": plain, "fused_ms": fused, "ratio": statistics.median(ratios)}
    if args.json:
        args.json.write_text(json.dumps(results), encoding="utf-8")


def compare(args, tokens):
    """Milliseconds per round and MiB of (plain, fused), and the fused tangent's error against float64."""
    import torch

    from mf_dist.models.attention import attention_with_tangent
    from mf_dist.models.fused_attention import fused_attention_with_tangent

    def plain(qkv, dqkv):
        split = (a.unflatten(-1, (3, args.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0) for a in (qkv, dqkv))
        return tuple(a.transpose(1, 2).flatten(2) for a in attention_with_tangent(*next(split), *next(split)))

    def fused(qkv, dqkv):
        return fused_attention_with_tangent(qkv, dqkv, args.heads)

    g = torch.Generator().manual_seed(tokens)
    shape = (2, args.rows, tokens, 3 * args.heads * args.size)
    pair = torch.randn(shape, generator=g).bfloat16().to("cuda")
    exact = plain(*pair[:, :1].double())[1]
    error = ((fused(*pair[:, :1])[1] - exact).norm() / exact.norm()).item()
    del exact
    forms = (torch.compile(plain, fullgraph=True, dynamic=False), torch.compile(fused, fullgraph=True, dynamic=False))
    milliseconds, mib = ([], []), []
    with torch.no_grad():
        for form in forms:
            form(*pair)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            form(*pair)
            mib.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        for _ in range(args.rounds):
            for form, times in zip(forms, milliseconds, strict=True):
                torch.cuda.synchronize()
                start = time.perf_counter()
                form(*pair)
                torch.cuda.synchronize()
                times.append(1e3 * (time.perf_counter() - start))
    return {"ms": milliseconds, "mib": mib, "error": error}


if __name__ == "__main__":
    sys.exit(main())
