"""Times the VAE's encoder: images/s in each precision, against its FLOPs and the machine's measured peak.

    python tools/bench/bench_encode.py --vae stabilityai/sd-vae-ft-mse
    python tools/bench/bench_encode.py --vae mf_dist/assets/digits-vae --resolution 32 --precisions fp32 --forms eager

Every form encodes the same random images, from uint8 on the CPU to moments on the CPU; forms are interleaved, medians
over --rounds. The peak is that of a square matrix product in the same precision. On a GPU the five most expensive
kernels of the last form are listed.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from bench_measure import matmul_peak, now

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.figures import three_digits
from mf_dist.runtime.paths import expanded, expanded_path


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--vae", type=expanded, required=True, help="folder or hub id of a diffusers AutoencoderKL")
    parser.add_argument("--resolution", type=int, default=256, help="side of the images (default 256)")
    parser.add_argument("--batch", type=int, default=32, help="images encoded together (default 32)")
    parser.add_argument("--precisions", default="fp32,tf32,bf16", help="comma-separated (default fp32,tf32,bf16)")
    parser.add_argument("--forms", default="eager,compiled", help="comma-separated (default eager,compiled)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=expanded_path, help="also write the median images/s to this file")
    args = parser.parse_args()
    for text, known in ((args.precisions, {"fp32", "tf32", "bf16"}), (args.forms, {"eager", "compiled"})):
        if set(text.split(",")) - known:
            raise UserError(f"{text!r}: expected some of {', '.join(sorted(known))}")
    if args.rounds < 1 or args.batch < 1 or args.resolution < 1:
        raise UserError("--rounds, --batch and --resolution must be at least 1")
    return args


@command_line
def main() -> None:
    args = parse()
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mf_dist.runtime.compiler import require_compiler
    from mf_dist.vae import Vae

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if not on_gpu:
        torch.set_num_threads(1)  # as tools/encode_latents.py does
    if "compiled" in args.forms.split(","):
        require_compiler(device, "give --forms eager")
    forms = {
        f"{precision}, {form}": Vae(args.vae, device, precision=precision, compiled=form == "compiled")
        for precision in args.precisions.split(",")
        if on_gpu or precision != "tf32"
        for form in args.forms.split(",")
    }
    shape = (args.batch, 3, args.resolution, args.resolution)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact = next(iter(forms.values()))
    with FlopCounterMode(display=False) as counter:
        Vae(args.vae, device).encode(pixels)
    flops = counter.get_total_flops() / args.batch
    seconds = {name: [] for name in forms}
    for vae in forms.values():
        vae.encode(pixels)  # compiles, and picks kernels
    for _ in range(args.rounds):
        for name, vae in forms.items():
            start = now()
            vae.encode(pixels).cpu()
            seconds[name].append(now() - start)
    where = torch.cuda.get_device_name() if on_gpu else "1 CPU thread"
    print(
        f"{Path(args.vae).name} at {args.resolution} px, batch {args.batch}, {where}: {flops / 1e9:.4g} GFLOP per image"
    )
    peaks = {precision: matmul_peak(device, precision) for precision in {vae.precision for vae in forms.values()}}
    for name, vae in forms.items():
        report(name, vae, exact, pixels, seconds[name], flops, peaks[vae.precision])
    if args.json:
        rates = {name: args.batch / statistics.median(taken) for name, taken in seconds.items()}
        args.json.write_text(json.dumps(rates), encoding="utf-8")
    if on_gpu:
        list_kernels(list(forms.values())[-1], pixels)


def report(name, vae, exact, pixels, seconds, flops, peak):
    rates = sorted(len(pixels) / s for s in seconds)
    rate = statistics.median(rates)
    a, b = vae.encode(pixels), exact.encode(pixels)
    print(
        f"{name:16}{three_digits(rate):>9} images/s ({three_digits(rates[0])} to {three_digits(rates[-1])}), "
        f"{three_digits(rate * flops / 1e12)} TFLOP/s, "
        f"{rate * flops / peak:.0%} of a matrix product's {peak / 1e12:.2f}; "
        f"error {((a - b).norm() / b.norm()).item():.1e}"
    )


def list_kernels(vae, pixels):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        vae.encode(pixels).cpu()
    print(seen.key_averages().table(sort_by="self_device_time_total", row_limit=5, max_name_column_width=70))


if __name__ == "__main__":
    sys.exit(main())
