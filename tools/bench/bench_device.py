"""What all other figures are divided by: the device's matrix products and copies, its software and attention kernels.

    python tools/bench/bench_device.py                                   # a GPU
    python tools/bench/bench_device.py --size 1024 --gigabytes 0.1       # a CPU

Prints one JSON object: versions; TFLOP/s of a square bf16 product of --size; TB/s of a copy of --gigabytes, read and
written; and which attention torch chooses for XL's heads (bf16 and fp32).
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

from bench_measure import now

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded_path

ROUNDS = 10
XL_HEADS = (32, 16, 256, 72)
"""Rows, heads, tokens, head size."""


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", type=int, default=8192, help="side of the matrices (default 8192)")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="bytes that are copied, in 1e9 (default 4)")
    parser.add_argument("--json", type=expanded_path, help="also write the result to this file")
    args = parser.parse_args()
    if args.size < 1 or args.gigabytes <= 0:
        raise UserError("--size and --gigabytes must be above 0")
    return args


def median_seconds(call):
    call()
    times = []
    for _ in range(ROUNDS):
        start = now()
        call()
        times.append(now() - start)
    return statistics.median(times)


def chosen_attention(device, dtype):
    """Name of the backend of scaled_dot_product_attention."""
    import torch
    from torch.nn.attention import SDPBackend

    q = torch.empty(XL_HEADS, device=device, dtype=dtype)
    return SDPBackend(torch._fused_sdp_choice(q, q, q)).name


def driver():
    """The driver's version and the GPU's clocks as nvidia-smi tells them; None without it."""
    if not shutil.which("nvidia-smi"):
        return None
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    return subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()


@command_line
def main() -> None:
    args = parse()
    import torch

    from mf_dist.runtime.distributed import choose_device

    device = choose_device(0)
    a = torch.randn(args.size, args.size, device=device).bfloat16()
    source = torch.zeros(int(args.gigabytes * 1e9), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "driver": driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "product_tflops": 2 * args.size**3 / median_seconds(lambda: a @ a) / 1e12,
        "copy_tb_per_s": 2 * source.numel() / median_seconds(lambda: target.copy_(source)) / 1e12,
        "attention_bf16": chosen_attention(device, torch.bfloat16),
        "attention_fp32": chosen_attention(device, torch.float32),
    }
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
